"""Numbers of bytes and tokens as people write them, as vLLM's options do."""

from __future__ import annotations

import re

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_FORM = re.compile(r"(\d+(?:\.\d+)?) ?([kKmMgGtT]?)(i?[bB])?")


def parse_size(text: str) -> int:
    """Bytes or tokens of "4GiB", "2.5G", "512M" or "4096": G and GiB are 2^30, g and GB 10^9.

    Raises ValueError for another form.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size: expected a number as 4GiB, 2.5G, 512M or 4096")
    number, unit, suffix = match[1], match[2], match[3] or ""
    if suffix.startswith("i"):
        unit = unit.upper()
    elif suffix:  # GB, gb
        unit = unit.lower()
    if suffix.startswith("i") and not unit:
        raise ValueError(f"{text!r} is no size: a letter is missing before iB")
    value = float(number) * _UNITS[unit]
    if not value.is_integer() and not unit:
        raise ValueError(f"{text!r} is no size: a fraction needs a unit, as in 2.5G")
    return int(value)


def size_text(number: int) -> str:
    """Bytes for people: "1.5 GiB", "128 MiB"."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(number) >= unit:
            value = number / unit
            return f"{value:.1f} {name}" if value < 10 else f"{value:,.0f} {name}"
    return f"{number} bytes"
