"""Checks of a client's arguments, made before gRPC sees them: its errors name neither the field nor the value."""

from __future__ import annotations

import re

from focusllava.errors import FocusClientError

MAX_TIMEOUT_S = 86400.0
"""Longest timeout: a day."""
_HOST_PORT = re.compile(r"(?:\[[^\s/\[\]]+\]|[^\s:/\[\]]+):([0-9]{1,5})")
_SCHEMES = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "vsock:", "xds:")
"""gRPC's own ways to name a server; what follows is for gRPC to judge."""
_UNSENDABLE = re.compile(r"[^!-~]")
"""Characters that no key may have: gRPC refuses line breaks and everything beyond ASCII, HTTP spaces too."""


def checked_address(address: str) -> str:
    """Raises FocusClientError (INVALID_ARGUMENT) unless it is host:port, [IPv6]:port or one of gRPC's schemes."""
    if isinstance(address, str):
        match = _HOST_PORT.fullmatch(address)
        if (match and 0 < int(match[1]) < 65536) or address.startswith(_SCHEMES):
            return address
    raise FocusClientError("INVALID_ARGUMENT", f"address: is {address!r}, expected host:port, such as 127.0.0.1:9000")


def checked_api_key(api_key: str | None) -> str | None:
    """The key, or None for an empty one. Raises FocusClientError (INVALID_ARGUMENT), which does not show it."""
    if api_key is None or isinstance(api_key, str):
        bad = _UNSENDABLE.search(api_key or "")
        if bad is None:
            return api_key or None
        what = f"its character {bad.start() + 1} is a line break, a space or not ASCII"
    else:
        what = f"is a {type(api_key).__name__}, expected a str"
    raise FocusClientError("INVALID_ARGUMENT", f"api_key: {what} (the key itself is not shown)")


def checked_timeout(timeout_s: float | None) -> float | None:
    """Raises FocusClientError (INVALID_ARGUMENT) unless it is positive and at most a day; None waits for ever."""
    try:
        if timeout_s is None or 0 < timeout_s <= MAX_TIMEOUT_S:  # neither holds for nan
            return timeout_s
    except TypeError:
        pass
    raise FocusClientError(
        "INVALID_ARGUMENT", f"timeout_s: is {timeout_s!r}, expected seconds in (0, {MAX_TIMEOUT_S:.0f}]"
    )
