"""Parts that the plain install has no libraries for. They are found by entry point, so that nothing here names them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Any

COMMANDS = "focusllava.commands"
"""Group of the click commands that other parts add to `focusllava`. Their modules import nothing heavy: `--help` loads
them all."""
PARTS = "focusllava.parts"
"""Group of what the client passes on to: `LocalModel`, and what describes a checkpoint."""
INSTALL = "pip install 'focusllava[serve]' (in the source tree: pip install '.[serve]')"


def names(group: str) -> Iterable[str]:
    """Names of a group's entry points."""
    return entry_points(group=group).names


def load(group: str, name: str) -> Any:
    """The object of an entry point; None where there is none of this name.

    Raises ModuleNotFoundError, which says what to install, where a library is missing.
    """
    for found in entry_points(group=group, name=name):
        try:
            return found.load()
        except ModuleNotFoundError as error:
            raise not_installed(error, name) from None
    return None


def not_installed(error: ModuleNotFoundError, what: str) -> ModuleNotFoundError:
    """The same error with what to do about it."""
    return ModuleNotFoundError(f"{error.name} is not installed, and {what} needs it: {INSTALL}", name=error.name)
