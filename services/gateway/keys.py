"""API keys: who may come in. They are known by their hashes, from a file that may change while it is served."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import pathlib
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass

import yaml

from services.common.errors import InvalidInput, WrongKey
from services.common.logs import LOGGER
from services.common.settings import build_settings
from services.common.telemetry import Metrics
from services.gateway.callers import ApiKey, Caller

_log = logging.getLogger(LOGGER)

KEYS_FILE, KEYS_TEXT = "FOCUSLLAVA_API_KEYS_FILE", "FOCUSLLAVA_API_KEYS"
"""Variables of the environment: the path of a file of keys, or what would stand in one."""
PREFIX = "fl-"
"""How each key begins, so that a lost one is known for what it is."""
RELOAD_S = 1.0
"""Seconds between two looks at the file."""
_FIELD = "authorization"


@dataclass(frozen=True, kw_only=True)
class _File:
    """What a file of keys holds."""

    keys: tuple[ApiKey, ...]


def new_key() -> str:
    """A key of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def parse_keys(text: str) -> tuple[ApiKey, ...]:
    """The entries of `keys: [...]` in YAML or JSON. Raises InvalidInput for what is wrong, and for two of a kind."""
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise InvalidInput(f"is no YAML{f', line {mark.line + 1}' if mark else ''}", field="keys") from None
    if not isinstance(raw, Mapping):  # an editor may just be writing it
        raise InvalidInput("is missing, expected a mapping with a list of keys", field="keys")
    keys = build_settings(_File, raw).keys
    for what in ("name", "sha256"):
        seen: dict[str, int] = {}
        for index, key in enumerate(keys):
            first = seen.setdefault(getattr(key, what), index)
            if first != index:
                raise InvalidInput(f"is the same as that of keys[{first}]", field=f"keys[{index}].{what}")
    return keys


def read_keys(path: pathlib.Path) -> tuple[ApiKey, ...]:
    """The entries of a file. Raises InvalidInput as `parse_keys`, and for a file that cannot be read."""
    try:
        text = path.read_text("utf8")
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or "is not UTF-8"
        raise InvalidInput(f"{path}: {said}", field="api_keys") from None
    return parse_keys(text)


class Keys:
    """The callers who may come in; everybody, where no keys are configured."""

    def __init__(self, metrics: Metrics, *, path: str | os.PathLike[str] | None = None, text: str | None = None):
        """path: a file of keys; else text: what would stand in it. Raises InvalidInput for what is wrong there."""
        self._metrics = metrics
        self._path = pathlib.Path(path) if path is not None else None
        self._anybody = Caller() if path is None and text is None else None
        self._callers: dict[str, Caller] = {}
        self._stamp, self._looked_at = self._stamp_now(), time.monotonic()
        if self._path is not None:
            self._take(read_keys(self._path))
        elif text is not None:
            self._take(parse_keys(text))

    @classmethod
    def configured(cls, path: str | None, environment: Mapping[str, str], metrics: Metrics) -> Keys:
        """The keys of `path`, else of the environment, else none. What is set and empty is wrong, not unset."""
        path = environment.get(KEYS_FILE) if path is None else path
        return cls(metrics, path=path, text=environment.get(KEYS_TEXT))

    def caller(self, authorization: str | None) -> Caller:
        """Who asks, by the header or metadata `authorization`. Raises WrongKey."""
        if self._anybody is not None:
            return self._anybody
        self._reload()
        found = self._known(authorization or "")
        if found is None:
            self._metrics.count("focusllava_requests", outcome=WrongKey.code.value, key="")
            wrong = "has a key that is not known here" if authorization else "is missing"
            raise WrongKey(f"{wrong}, expected 'Bearer KEY'", field=_FIELD)
        return found

    def _known(self, authorization: str) -> Caller | None:
        scheme, _, key = authorization.strip().partition(" ")
        hashed, found = hash_of(key.strip()), None
        for caller in self._callers.values():  # all, whichever it is: no time tells how much of a key is right
            assert caller.key is not None
            if hmac.compare_digest(caller.key.sha256, hashed):
                found = caller
        return found if scheme.lower() == "bearer" else None

    def _reload(self) -> None:
        """Takes over a file that has changed; a broken one changes nothing, and the log says so."""
        now = time.monotonic()
        if self._path is None or now - self._looked_at < RELOAD_S:
            return
        self._looked_at = now
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            keys = read_keys(self._path)
        except InvalidInput as error:
            _log.error("%s: %s; the %d keys of before stay", self._path, error, len(self._callers))
            return
        self._take(keys)
        _log.warning("%s: has %d keys now: %s", self._path, len(keys), ", ".join(self._callers) or "none, so nobody")

    def _take(self, keys: tuple[ApiKey, ...]) -> None:
        """A holder keeps what is in flight and spent, whatever else changes."""
        self._callers = {key.name: self._callers.get(key.name) or Caller() for key in keys}
        for key in keys:
            self._callers[key.name].key = key

    def _stamp_now(self) -> tuple[int, ...] | None:
        """What changes when the file does; None where it cannot be looked at."""
        try:
            found = self._path.stat() if self._path else None
        except OSError:
            return None
        return found and (found.st_mtime_ns, found.st_size, found.st_ino)
