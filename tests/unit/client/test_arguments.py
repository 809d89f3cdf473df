"""What the client refuses before anything is sent: each error names the field and the value."""

from __future__ import annotations

import io
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from focusllava import AsyncFocusClient, FocusClient, FocusClientError, Turn, messages, user
from focusllava.v1 import focus_pb2
from focusllava.wire import build_request


@pytest.fixture
def client() -> Iterator[FocusClient]:
    with FocusClient("127.0.0.1:9") as client:  # nobody is there: what is refused here is refused by the client
        yield client


def refused(code: str, call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(FocusClientError) as caught:
        call(*args, **kwargs)
    assert caught.value.code == code
    return caught.value.message


@pytest.mark.parametrize(
    "address",
    ["", "localhost", "http://127.0.0.1:9000", "127.0.0.1:", ":9000", "::1", "[::1]", "host:0", "host:65536",
     "host:port", "a b:1", "host:9000/", "host:9000\n", "host:\u0661", None, 9000],
)  # fmt: skip
def test_addresses_refused(address: Any) -> None:
    message = refused("INVALID_ARGUMENT", FocusClient, address)
    assert message.startswith(f"address: is {address!r}, expected host:port")


@pytest.mark.parametrize(
    "address", ["127.0.0.1:9000", "localhost:1", "[::1]:65535", "dns:///h:1", "unix:/tmp/s", "ipv4:127.0.0.1:9"]
)
def test_addresses_accepted(address: str) -> None:
    with FocusClient(address) as client:
        assert client.address == address


@pytest.mark.parametrize("api_key", ["s3cret\n", "s3cret\u00e9", "s3 cret", "\ts3cret", b"s3cret"])
def test_keys_refused_without_showing_them(api_key: Any) -> None:
    message = refused("INVALID_ARGUMENT", FocusClient, "h:1", api_key=api_key)
    assert message.startswith("api_key: ") and "cret" not in message


@pytest.mark.parametrize("timeout_s", [0, -1, math.inf, math.nan, 1e12, 86400.5, "5"])
def test_timeouts_refused(client: FocusClient, timeout_s: Any) -> None:
    expected = f"timeout_s: is {timeout_s!r}, expected seconds in (0, 86400]"
    assert refused("INVALID_ARGUMENT", FocusClient, timeout_s=timeout_s) == expected
    assert refused("INVALID_ARGUMENT", client.ask, None, "q", timeout_s=timeout_s) == expected
    assert refused("INVALID_ARGUMENT", client.model_info, timeout_s=timeout_s) == expected


async def test_async_client_refuses_the_same() -> None:
    for arguments in ({"address": "h"}, {"api_key": "\n"}, {"timeout_s": math.inf}):
        refused("INVALID_ARGUMENT", AsyncFocusClient, **arguments)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("seed", 1.5, "a whole number from -92"), ("seed", 2**64, "a whole number from -9223372036854775808 to"),
        ("top_k", -1, "a whole number from 0 to 4294967295"), ("max_tokens", -5, "a whole number from 0 to"),
        ("max_tokens", 2.5, "a whole number from 0 to"), ("logprobs", -1, "a whole number from 0 to"),
        ("threshold", "a", "a number"), ("keep_ratio", [], "a number"), ("temperature", "hot", "a number"),
        ("ignore_eos", "yes", "True or False"), ("request_id", 3, "text"), ("request_id", "\udcff", "text"),
        ("stop", 5, "text, or several in a list"), ("stop", [1], "text"), ("stop", "\udcff", "text"),
    ],
)  # fmt: skip
def test_settings_that_the_wire_cannot_carry(client: FocusClient, name: str, value: Any, expected: str) -> None:
    message = refused("INVALID_ARGUMENT", client.ask, None, "q", **{name: value})
    assert message.startswith(f"{name}: is {value!r}, expected {expected}")


def test_one_stop_string_is_one() -> None:
    def stops(value: Any) -> list[str]:
        return list(build_request([user("q")], stop=value).sampling.stop)

    assert stops("abc") == ["abc"] and stops(("a", "b")) == ["a", "b"] and stops(None) == stops([]) == []


def test_none_is_the_server_s_default() -> None:
    nothing: dict[str, Any] = dict.fromkeys(("vision_sampler", "text_sampler", "ignore_eos", "request_id", "seed"))
    assert build_request([user("q")], **nothing) == build_request([user("q")])


def test_turns_that_the_wire_cannot_carry() -> None:
    for part in (3, None, "half \udce9"):
        message = refused("INVALID_ARGUMENT", build_request, [user("q"), Turn(role="user", parts=("a", part))])  # type: ignore[arg-type]
        assert message == f"turns[1].parts[1]: is {part!r}, expected text or bytes of an image"
    message = refused("INVALID_ARGUMENT", build_request, [Turn(role="judge", parts=("a",))])
    assert message == "turns[0].role: is 'judge', expected system, user, assistant"


def images_of(request: focus_pb2.ChatRequest) -> list[bytes]:
    return [part.image for part in request.turns[-1].parts if part.WhichOneof("part") == "image"]


def test_pil_images_and_generators(tmp_path: pathlib.Path) -> None:
    picture = Image.new("RGB", (3, 2), (1, 2, 3))
    (sent,) = images_of(build_request([user("q", images=picture)]))
    read = Image.open(io.BytesIO(sent))
    assert read.format == "PNG" and read.size == (3, 2) and read.getpixel((0, 0)) == (1, 2, 3)
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode())
    assert images_of(build_request([user("q", images=sorted(tmp_path.iterdir()))])) == [b"a", b"b"]
    assert sorted(images_of(build_request([user("q", images=tmp_path.iterdir())]))) == [b"a", b"b"]
    assert images_of(build_request([user("q", images=str(tmp_path / "a"))])) == [b"a"]
    assert images_of(build_request([user("q", images=[bytearray(b"x"), memoryview(b"y")])])) == [b"x", b"y"]


def test_images_refused(client: FocusClient, tmp_path: pathlib.Path) -> None:
    closed = io.BytesIO(b"x")
    closed.close()
    for images, said in (
        (5, "images[0]: is a int, expected a path, bytes, an open binary file or a PIL image"),
        ([b"x", None], "images[1]: is a NoneType, expected"),
        ([b"x", [b"y"]], "images[1]: is a list, expected"),
        (Image.new("HSV", (2, 2)), "images[0]: cannot read Image: cannot write mode HSV as TIFF"),
        (closed, "images[0]: cannot read BytesIO: I/O operation on closed file"),
        (io.StringIO("x"), "images[0]: the file was opened as text"),
        ("a\0b", "images[0]: cannot read 'a\\x00b': embedded null byte"),
        (tmp_path, f"images[0]: cannot read {str(tmp_path)!r}: Is a directory"),
    ):
        assert refused("INVALID_ARGUMENT", client.ask, images, "q").startswith(said)


def test_oversized_images_are_not_read(client: FocusClient, tmp_path: pathlib.Path, monkeypatch) -> None:
    path = tmp_path / "big.png"
    with path.open("wb") as file:
        file.truncate(300 * 2**20)  # a hole: no disk
    message = refused("RESOURCE_EXHAUSTED", client.ask, path, "q")
    assert message == f"images[0]: {str(path)!r}: 314572800 bytes, a request carries at most 268435456 bytes of images"
    monkeypatch.setattr(messages, "MAX_IMAGES_BYTES", 100)
    for images, said in (
        ("/dev/zero", "images[0]: '/dev/zero': 101 bytes"),
        ([b"x", io.BytesIO(bytes(101))], "images[1]: BytesIO: 101 bytes"),
        ([bytes(60), bytes(60)], "images, together: 120 bytes"),
    ):
        assert refused("RESOURCE_EXHAUSTED", client.ask, images, "q").startswith(said)
    assert len(images_of(build_request([user("q", images=[bytes(50), bytes(50)])]))) == 2


def test_settings_beside_plain_numbers_are_sent() -> None:
    sampling = build_request(
        [user("What?")], stop_token_ids=[3, 4], logit_bias={5: -100, 6: 0.5}, min_tokens=2, seed=-1,
        include_stop_str_in_output=True, keep_special_tokens=True,
    ).sampling  # fmt: skip
    assert (list(sampling.stop_token_ids), dict(sampling.logit_bias)) == ([3, 4], {5: -100, 6: 0.5})
    assert (sampling.min_tokens, sampling.seed) == (2, 2**64 - 1)
    assert sampling.include_stop_str_in_output and sampling.keep_special_tokens and not sampling.HasField("constraint")
    assert build_request([user("x")], continue_final_message=True).continue_final_message


@pytest.mark.parametrize(
    ("setting", "sent"),
    [
        ({"json_object": True}, "json_object: true"),
        ({"json_object": False, "regex": None}, ""),
        ({"json_schema": {"enum": ["é"]}}, r'json_schema: "{\"enum\": [\"\\u00e9\"]}"'),
        ({"json_schema": {}}, 'json_schema: "{}"'),
        ({"json_schema": "{}"}, 'json_schema: "{}"'),
        ({"choice": ["a", "b"]}, 'choice {\n  texts: "a"\n  texts: "b"\n}'),
        ({"choice": []}, "choice {\n}"),
        ({"regex": "a+"}, 'regex: "a+"'),
        ({"grammar": 'start: "a"'}, r'grammar: "start: \"a\""'),
    ],
)
def test_constraints_are_sent(setting: Any, sent: str) -> None:
    assert str(build_request([user("What?")], **setting).sampling.constraint).strip() == sent


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"json_object": True, "regex": "a"}, "json_object, regex: expected one of them at most"),
        ({"json_schema": 3}, "json_schema: is 3, expected a mapping or JSON text"),
        ({"json_schema": {"a": {1}}}, "json_schema: is {'a': {1}}, expected a mapping or JSON text"),
        ({"choice": "ab"}, "choice: is 'ab', expected a list of texts"),
        ({"choice": [1]}, "choice: is [1], expected a list of texts"),
        ({"regex": b"\xff"}, "regex: is b'\\xff', expected text"),
        ({"logit_bias": [1]}, "logit_bias: is [1], expected a mapping from token ids to numbers"),
        ({"logit_bias": {"a": 1}}, "logit_bias: is {'a': 1}, expected a mapping"),
        ({"stop_token_ids": 3}, "stop_token_ids: is 3, expected a list of token ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids: is [-1], expected a list of token ids"),
        ({"seed": -(2**63) - 1}, "seed: is -9223372036854775809, expected a whole number from -9223372036854775808"),
        ({"seed": 2**64}, "seed: is 18446744073709551616, expected a whole number"),
        ({"min_tokens": 1.5}, "min_tokens: is 1.5, expected a whole number"),
    ],
)
def test_settings_that_no_message_holds_are_refused(setting: Any, message: str) -> None:
    assert refused("INVALID_ARGUMENT", build_request, [user("What?")], **setting).startswith(message)
