"""Hostile inputs: seeded mutations of valid ones, and classes of them that are made by hand."""

from __future__ import annotations

import copy
import io
import json
import math
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from PIL import Image

Kind = TypeVar("Kind", bound=Message)

TEXTS = (
    "", " ", "\0", "\n" * 50, "../../../../etc/passwd", "/etc/passwd\0.png", "C:\\Windows\\win.ini", "%s%n%x",
    "{{7*7}}",
    "${jndi:ldap://127.0.0.1/a}", "'; DROP TABLE images; --", "<script>alert(1)</script>", "\u202e\u0000\ufeff",
    "😀" * 500,
    "<image>", "</s><s><unk><pad>", "x" * 70_000, "a\u0300" * 2_000, "\ud7ff\ue000", "NaN", "-1", "1e999", "null",
    "[" * 5_000,
)  # fmt: skip
NUMBERS = (0, -1, 1, 2, 127, 128, 255, 2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**32, 2**53 + 1, 2**63 - 1, 2**63,
           -(2**63),
           2**64 - 1, 2**64, 10**30)  # fmt: skip
FLOATS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 5e-324, 1e308, -1e308, 1.0000001, -1.0, 2.0000001, 3e38)
JSON_VALUES: tuple[Any, ...] = (
    None, True, False, [], {}, [[]], [None], {"": None}, {"a": {"b": {"c": []}}}, [1, "a", {}], *TEXTS, *NUMBERS,
    *FLOATS,
)  # fmt: skip


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """The data with some bits flipped, and slices lost, doubled, moved or made up."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(result) + 1)
        size = rng.choice((1, 1, 2, 4, 8, 64, 1024))
        match rng.randrange(7):
            case 0 if result:
                result[at % len(result)] ^= 1 << rng.randrange(8)
            case 1 if result:
                result[at % len(result)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                del result[at : at + size]
            case 3:
                result[at:at] = rng.randbytes(size)
            case 4:
                result[at:at] = result[at : at + size] * rng.choice((1, 2, 50))
            case 5:
                del result[at:]
            case _:
                piece = result[at : at + size]
                del result[at : at + size]
                other = rng.randrange(len(result) + 1)
                result[other:other] = piece
    return bytes(result)


def mutated_message(message: Kind, rng: random.Random) -> Kind:
    """A copy in which some fields, at any depth, hold what they should not."""
    result = copy.deepcopy(message)
    for _ in range(rng.choice((1, 1, 2, 3))):
        _spoil(rng.choice(_messages(result)), rng)
    return result


def _messages(message: Message) -> list[Message]:
    found = [message]
    for field, value in message.ListFields():
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for each in value if field.is_repeated else (value,):
                found += _messages(each)
    return found


def _spoil(message: Message, rng: random.Random) -> None:
    fields = message.DESCRIPTOR.fields
    if not fields:
        return
    field: Any = rng.choice(list(fields))
    if rng.random() < 0.1:
        message.ClearField(field.name)
        return
    try:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            getattr(message, field.name)[rng.choice(NUMBERS[:10])] = rng.choice(FLOATS)
        elif field.message_type is not None and field.is_repeated:
            repeated = getattr(message, field.name)
            for _ in range(rng.choice((1, 2, 200))):
                new = repeated.add()
                if len(repeated) > 1 and rng.random() < 0.5:
                    new.CopyFrom(repeated[0])
        elif field.message_type is not None:
            getattr(message, field.name).SetInParent()
        elif field.is_repeated:
            getattr(message, field.name).extend(_scalar(field, rng) for _ in range(rng.choice((1, 3, 300))))
        else:
            setattr(message, field.name, _scalar(field, rng))
    except (ValueError, TypeError):  # what the type itself cannot hold
        pass


def _scalar(field: FieldDescriptor, rng: random.Random) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return rng.choice((b"", b"\0", rng.randbytes(7), rng.randbytes(5_000), *IMAGES[:4]))
        case FieldDescriptor.CPPTYPE_STRING:
            return rng.choice(TEXTS)
        case FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return rng.choice(FLOATS)
        case _:
            return rng.choice(NUMBERS)


def mutated_json(value: Any, rng: random.Random) -> Any:
    """A copy in which some places hold another value, or are lost, or have company."""
    result = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = _places(result)
        if not places:
            return rng.choice(JSON_VALUES)
        holder, key = rng.choice(places)
        match rng.randrange(5):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice(TEXTS)] = rng.choice(JSON_VALUES)
            case 1:
                holder.extend([holder[key]] * rng.choice((1, 50)))
            case 2:
                nested = holder[key]
                for _ in range(rng.choice((1, 5, 200))):
                    nested = [nested]
                holder[key] = nested
            case _:
                holder[key] = rng.choice(JSON_VALUES)
    return result


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Each place of a value: its dict or list, and its key or index."""
    found: list[tuple[Any, Any]] = []
    left = [value]
    while left:
        holder = left.pop()
        items = holder.items() if isinstance(holder, dict) else enumerate(holder) if isinstance(holder, list) else ()
        for key, inner in list(items):
            found.append((holder, key))
            left.append(inner)
    return found


def mutated_text(value: Any, rng: random.Random) -> bytes:
    """JSON of a value, mutated as a value or as bytes."""
    if rng.random() < 0.7:
        return json.dumps(mutated_json(value, rng)).encode(errors="surrogatepass")
    return mutated_bytes(json.dumps(value).encode(), rng)


def _png(size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 64).convert("RGB").save(file, **{"format": "PNG", **options})
    return file.getvalue()


def _bomb(width: int, height: int, rows: int = 3) -> bytes:
    """A PNG whose header says much more than its data hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * (min(width, 20_000) * 3 + 1) * rows, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _animated() -> bytes:
    file = io.BytesIO()
    frames = [Image.new("P", (20, 20), number) for number in range(40)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


VALID = [_png(), _png(format="JPEG"), _png(format="GIF"), _png(format="WEBP"), _png(format="BMP"), _png(format="TIFF")]
"""Files that mutations start from."""
IMAGES = (
    b"", b"\0", b"not an image", _bomb(2**31 - 1, 1), _bomb(60_000, 60_000), _bomb(0, 0), _bomb(10_000, 9_000),
    _bomb(1, 40_000), _png((1, 1)), _png((3_000, 1)), VALID[0][:33], VALID[1][:200], VALID[0] + b"\0" * 10_000,
    _animated(),
    b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", b"%PDF-1.4",
    b"II*\0" + b"\xff" * 64,
    b"RIFF\xff\xff\xff\xffWEBPVP8X" + b"\xff" * 40, b"GIF89a\xff\xff\xff\xff\xf7\0\0", b"BM" + b"\xff" * 52,
    b"\xff\xd8\xff\xe1\xff\xffExif\0\0MM\0*" + b"\xff" * 70_000,
)  # fmt: skip
"""Files that nobody should trust."""


def hostile_image(rng: random.Random) -> bytes:
    """One of `IMAGES`, or a mutated valid file."""
    return rng.choice(IMAGES) if rng.random() < 0.3 else mutated_bytes(rng.choice(VALID), rng)


_VALUES: tuple[Callable[[random.Random], str], ...] = (
    lambda rng: "",
    lambda rng: "a" * rng.choice((100, 5_000)),
    lambda rng: "/../../etc/passwd",
    lambda rng: "".join(map(chr, (rng.randrange(0x20, 0x7F) for _ in range(30)))),
    lambda rng: str(rng.choice(NUMBERS)),
    lambda rng: "Bearer " + "x" * 200,
    lambda rng: "application/json; charset=utf-32",
    lambda rng: "multipart/form-data; boundary=x",
    lambda rng: "00-" + "0" * 32 + "-" + "0" * 16 + "-ff",
)
HEADERS = (
    "content-type", "authorization", "x-request-id", "focusllava-timeout-ms", "traceparent", "accept", "host",
    "origin",
    "x-forwarded-for", "transfer-encoding-x", "accept-encoding", "content-encoding", "expect-x",
    "serve_multiplexed_model_id",
    "application", "grpc-timeout-x", "request_id", "multiplexed_model_id", "x-serve-session-id",
)  # fmt: skip


def hostile_headers(rng: random.Random) -> dict[str, str]:
    """Some headers or metadata, with values that nobody means."""
    return {name: rng.choice(_VALUES)(rng) for name in rng.sample(HEADERS, rng.randint(1, 4))}


def hostile_http(rng: random.Random) -> bytes:
    """Bytes for a socket: something like an HTTP request."""
    valid = (b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
             b"content-length: 2\r\nconnection: close\r\n\r\n{}")  # fmt: skip
    made = (
        b"GET / HTTP/9.9\r\n\r\n", b"\0" * 100, b"GET /\xff\xfe HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET " + b"/a" * 40_000 + b" HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
        b"GET /%00%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nZZZ\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n{}",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 50,
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + b"\xff" * 200,
        b"OPTIONS * HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
        b"GET /-/routes HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
        b"GET /v1/models/..%2f..%2fetc HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
        b"GET /encoder/x HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
    )  # fmt: skip
    return rng.choice(made) if rng.random() < 0.3 else mutated_bytes(valid, rng)
