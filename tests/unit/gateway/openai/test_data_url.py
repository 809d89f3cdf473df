"""Base64 as people make it is the file it was made of; what it is not is named, with its place."""

from __future__ import annotations

import base64
import random

import pytest

from services.common.errors import InvalidInput
from services.gateway.openai.data_url import decode

DATA = random.Random(1).randbytes(2_000_003)  # over two pieces of a mebibyte, and a padded end
TEXT = base64.b64encode(DATA).decode()
HEAD = "data:image/png;base64,"


@pytest.mark.parametrize(
    "head", [HEAD, "DATA:IMAGE/PNG;BASE64,", "data:;base64,", "data:image/png;charset=utf-8;base64,"]
)
def test_every_head(head):
    assert decode(head + TEXT, "f") == DATA


@pytest.mark.parametrize(
    "text",
    [
        TEXT + "\n",
        base64.encodebytes(DATA).decode(),
        TEXT[:-5] + "\r\n" + TEXT[-5:],
        "\t " + TEXT[:9] + "\f" + TEXT[9:],
        TEXT.rstrip("="),
        TEXT + "\n=",
        base64.urlsafe_b64encode(DATA).decode(),
    ],
    ids=[
        "newline at the end",
        "wrapped",
        "wrapped by Windows",
        "white space",
        "no padding",
        "late padding",
        "URL-safe",
    ],
)
def test_every_way_to_write_it(text):
    assert decode(HEAD + text, "f") == DATA


@pytest.mark.parametrize("size", range(5))
def test_every_end(size):
    for text in (base64.b64encode(DATA[:size]).decode(), base64.b64encode(DATA[:size]).decode().rstrip("=")):
        assert decode(HEAD + text, "f") == DATA[:size]


@pytest.mark.parametrize(
    "url, says",
    [
        (HEAD + "ab%3D", "character 3 is '%'"),
        (HEAD + TEXT[:1_500_000] + "\u00e9" + TEXT, "character 1500001 is '\u00e9'"),
        (HEAD + "AA==AAAA", "character 3 is '=' (padding stands at its end only)"),
        (HEAD + TEXT[: 2**20 - 4] + "AA==" + TEXT, f"character {2**20 - 1} is '='"),
        (HEAD + "abc\x00", "character 4 is '\\x00'"),
        (HEAD + "abcde", "its last character is alone"),
        ("data:image/png,abc", "expected data:image/...;base64,..."),
        (TEXT, "nothing is fetched"),
        ("https://example.org/a.png", "nothing is fetched"),
        ("", "is ''"),
    ],
)
def test_what_is_wrong_is_named(url, says):
    with pytest.raises(InvalidInput) as caught:
        decode(url, "messages[0]")
    assert says in str(caught.value) and str(caught.value).startswith("messages[0]: ") and len(str(caught.value)) < 300
