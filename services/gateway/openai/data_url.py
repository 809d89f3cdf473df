"""A data: URL to bytes, as forgiving as browsers are (WHATWG's forgiving-base64), and of URL-safe base64 too."""

from __future__ import annotations

import base64
import re

from services.common.errors import InvalidInput

_PIECE_CHARS = 2**20
"""Characters of base64 that are decoded at once: others may run between two pieces."""
_SHOWN_CHARS = 60
_WHITESPACE = " \t\n\f\r"
_STANDARD = bytes.maketrans(b"-_", b"+/")
_NOT_BASE64 = re.compile(rf"[^A-Za-z0-9+/_{_WHITESPACE}-]")


def decode(url: str, field: str) -> bytes:
    """The bytes of data:...;base64,...

    White space, as of wrapped lines, may stand anywhere in the base64; padding may lack; "-" and "_" of the URL-safe
    alphabet are "+" and "/". Raises InvalidInput naming `field`: another kind of URL, or a wrong character and where it
    stands.
    """
    comma = url.find(",", 0, 1024)
    head = url[: max(comma, 0)].lower()
    # Fetching what a stranger names would let them reach whatever this machine reaches.
    if not (head.startswith("data:") and head.endswith(";base64")):
        expected = "expected data:image/...;base64,... (nothing is fetched: send the file itself)"
        raise InvalidInput(f"is {url[:_SHOWN_CHARS]!r}, {expected}", field=field)
    url = url.rstrip("=" + _WHITESPACE)
    decoded: list[bytes] = []
    rest = b""
    for start in range(comma + 1, len(url), _PIECE_CHARS):
        piece = url[start : start + _PIECE_CHARS]
        if not piece.isascii() or "=" in piece:
            raise _wrong_character(url, comma, field)
        rest += piece.encode().translate(_STANDARD, _WHITESPACE.encode())
        whole = len(rest) - len(rest) % 4
        try:
            decoded.append(base64.b64decode(rest[:whole], validate=True))
        except ValueError:
            raise _wrong_character(url, comma, field) from None
        rest = rest[whole:]
    if len(rest) == 1:
        raise InvalidInput("is not base64: its last character is alone, some are lost or one is too many", field=field)
    try:
        decoded.append(base64.b64decode(rest + b"=" * (-len(rest) % 4), validate=True))
    except ValueError:
        raise _wrong_character(url, comma, field) from None
    return b"".join(decoded)


def _wrong_character(url: str, comma: int, field: str) -> InvalidInput:
    """The error that names the first wrong character, and its place after the comma, counted from 1."""
    found = _NOT_BASE64.search(url, comma + 1)
    assert found, "base64 of its own characters alone, in groups of four, decodes"
    why = " (padding stands at its end only)" if found[0] == "=" else ""
    return InvalidInput(f"is not base64: character {found.start() - comma} is {found[0]!r}{why}", field=field)
