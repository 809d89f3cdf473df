"""Names of the visual tokens that lie on the shelves of other nodes, as their LLM stages said."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from services.common.port import SHELF_NAMES_METADATA

MOST = 65_536
"""Most images whose names are remembered, the latest used."""


class KnownNames:
    """Names by what this gateway knows the tokens by, and by shelf."""

    def __init__(self) -> None:
        self._names: OrderedDict[str, dict[str, str]] = OrderedDict()

    def name(self, shelf: str, key: str) -> str:
        """The name; empty where none is known. It may be gone from there by now."""
        found = self._names.get(key)
        if found is None:
            return ""
        self._names.move_to_end(key)
        return found.get(shelf, "")

    def learn(self, shelf: str, keys: Sequence[str], metadata: Iterable[tuple[str, str | bytes]] | None) -> None:
        """Takes over what a stage ended a call with."""
        said = dict(metadata or ()).get(SHELF_NAMES_METADATA)
        if said is None:
            return
        for key, name in zip(keys, str(said).split(","), strict=False):
            if name:
                self._names.setdefault(key, {})[shelf] = name
        while len(self._names) > MOST:
            self._names.popitem(last=False)

    def forget(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._names.pop(key, None)
