"""Tensors and visual tokens <-> protobuf."""

from __future__ import annotations

import dataclasses
import math
import sys

import numpy as np
import torch

from focusllava.v1 import encoder_pb2, tensor_pb2
from services.common.errors import InvalidInput, NotOnShelf
from services.common.int8 import GROUP
from services.common.shelf import Shelf
from services.common.types import CompressedVisualTokens

assert sys.byteorder == "little", "tensors are little-endian on the wire"

MAX_DIMENSIONS = 8
_DTYPES = {
    tensor_pb2.DATA_TYPE_FLOAT32: torch.float32,
    tensor_pb2.DATA_TYPE_FLOAT16: torch.float16,
    tensor_pb2.DATA_TYPE_BFLOAT16: torch.bfloat16,
    tensor_pb2.DATA_TYPE_SCALED_INT8: torch.int8,
}
_DATA_TYPES = {dtype: data_type for data_type, dtype in _DTYPES.items()}


def _describe(tensor: torch.Tensor, message: tensor_pb2.Tensor) -> None:
    assert tensor.dtype in _DATA_TYPES, f"{tensor.dtype} has no type on the wire"
    assert 1 <= tensor.ndim <= MAX_DIMENSIONS and tensor.numel(), f"shape {tuple(tensor.shape)} cannot cross the wire"
    message.data_type = _DATA_TYPES[tensor.dtype]
    message.shape.extend(tensor.shape)


def data_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Length of a tensor's data on the wire; int8 has its scales there too."""
    values = math.prod(shape)  # Python's integers cannot overflow
    return values * dtype.itemsize + (4 * (values // GROUP) if dtype is torch.int8 else 0)


def _checked(message: tensor_pb2.Tensor, size: int, field: str) -> tuple[torch.dtype, tuple[int, ...]]:
    """Type and shape of a tensor whose data has `size` bytes. Raises InvalidInput."""
    dtype = _DTYPES.get(message.data_type)
    if dtype is None:
        known = ", ".join(tensor_pb2.DataType.Name(value) for value in _DTYPES)
        raise InvalidInput(f"is {message.data_type}, expected one of {known}", field=f"{field}.data_type")
    shape = tuple(message.shape)
    if not 1 <= len(shape) <= MAX_DIMENSIONS:
        raise InvalidInput(f"has {len(shape)} dimensions, expected 1 to {MAX_DIMENSIONS}", field=f"{field}.shape")
    if any(size < 1 for size in shape):
        raise InvalidInput(f"is {list(shape)}, expected sizes of at least 1", field=f"{field}.shape")
    if dtype is torch.int8 and shape[-1] % GROUP:
        raise InvalidInput(f"is {list(shape)}, the last size must be a multiple of {GROUP}", field=f"{field}.shape")
    expected = data_bytes(shape, dtype)
    if size != expected:
        found = f"has {size} bytes, expected {expected} for shape {list(shape)} of {dtype}"
        raise InvalidInput(found, field=f"{field}.data")
    return dtype, shape


def tokens_to_proto(
    tokens: CompressedVisualTokens, into: encoder_pb2.CompressedVisualTokens | None = None
) -> encoder_pb2.CompressedVisualTokens:
    """Visual tokens as a message.

    into: an empty message to fill. One that becomes a field of another is copied, and this one may have 24 MB.
    """
    message = encoder_pb2.CompressedVisualTokens() if into is None else into
    _describe(tokens.tokens_ND, message.tokens)
    message.tokens.data = _bytes_of(tokens).numpy().tobytes()
    _describe_tokens(tokens, message)
    return message


def shelve(tokens: CompressedVisualTokens, shelf: Shelf, name: str, max_bytes: int) -> bool:
    """Leaves visual tokens on the shelf; False where they find no room there."""
    return shelf.put(name, described(tokens).SerializeToString(), _bytes_of(tokens), max_bytes)


def _bytes_of(tokens: CompressedVisualTokens) -> torch.Tensor:
    """uint8 [bytes]: the tensor's data on the wire, on the CPU; bytes, since numpy has no bfloat16."""
    data = tokens.tokens_ND.detach().cpu().contiguous().view(torch.uint8).view(-1)
    if tokens.scales_NG is None:
        return data
    return torch.cat([tokens.scales_NG.detach().cpu().contiguous().view(torch.uint8).view(-1), data])


def described(tokens: CompressedVisualTokens) -> encoder_pb2.CompressedVisualTokens:
    """All of the message but the tokens' data."""
    message = encoder_pb2.CompressedVisualTokens()
    _describe(tokens.tokens_ND, message.tokens)
    _describe_tokens(tokens, message)
    return message


def unshelve(message: encoder_pb2.CompressedVisualTokens, shelf: Shelf | None) -> bool:
    """Puts the tokens' data into a message that names them; False where they are no more on the shelf."""
    if not message.shelf_name:
        return True
    found = shelf.get(message.shelf_name) if shelf else None
    if found is None:
        return False
    message.ParseFromString(found.header)
    message.tokens.data = bytes(found.data)
    return True


def _describe_tokens(tokens: CompressedVisualTokens, message: encoder_pb2.CompressedVisualTokens) -> None:
    message.branch_ids = tokens.branch_ids_M.cpu().numpy().astype(np.uint8).tobytes()
    message.map_height, message.map_width = tokens.map_hw
    message.uncompressed_tokens = tokens.uncompressed_tokens
    message.content_hash, message.model_fingerprint = tokens.content_hash, tokens.model_fingerprint
    message.notes.extend(tokens.notes)
    message.image_height, message.image_width = tokens.image_size_hw
    message.base_branch_ids = tokens.base_branch_ids_M.cpu().numpy().astype(np.uint8).tobytes()


def tokens_from_proto(
    message: encoder_pb2.CompressedVisualTokens, field: str = "visual_tokens", shelf: Shelf | None = None
) -> CompressedVisualTokens:
    """Visual tokens of a message, or of the shelf where the message names them; these are mapped and not copied.

    Raises InvalidInput for a bad tensor, counts that contradict each other, or a hash that is not SHA-256, and
    NotOnShelf.
    """
    digest: bytes | None = None
    data: memoryview | bytearray
    if name := message.shelf_name:
        message, data = _shelved(message, field, shelf)
        digest = bytes.fromhex(name)
    else:
        data = bytearray(message.tokens.data)  # one copy: torch wants memory that may be written
    dtype, shape = _checked_tokens(message, len(data), field)
    scales_NG, start = None, 0
    if dtype is torch.int8:
        scales_NG = torch.frombuffer(data, dtype=torch.float32, count=math.prod(shape) // GROUP).view(shape[0], -1)
        start = scales_NG.nbytes
    tokens_ND = torch.frombuffer(data, dtype=dtype, offset=start).view(shape)
    return dataclasses.replace(_of_message(message, tokens_ND), scales_NG=scales_NG, digest=digest)


def outline_from_proto(message: encoder_pb2.CompressedVisualTokens) -> CompressedVisualTokens:
    """All of a message but the tokens' data, which may lie elsewhere: tokens_ND is on the meta device."""
    shape = tuple(message.tokens.shape)
    return _of_message(message, torch.empty(shape, dtype=_DTYPES[message.tokens.data_type], device="meta"))


def _of_message(message: encoder_pb2.CompressedVisualTokens, tokens_ND: torch.Tensor) -> CompressedVisualTokens:
    return CompressedVisualTokens(
        tokens_ND=tokens_ND,
        branch_ids_M=_bytes_tensor(message.branch_ids),
        map_hw=(message.map_height, message.map_width),
        uncompressed_tokens=message.uncompressed_tokens,
        content_hash=message.content_hash,
        model_fingerprint=message.model_fingerprint,
        notes=tuple(message.notes),
        image_size_hw=(message.image_height, message.image_width),
        base_branch_ids_M=_bytes_tensor(message.base_branch_ids),
    )


def _bytes_tensor(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def check_tokens(
    message: encoder_pb2.CompressedVisualTokens, field: str = "visual_tokens", shelf: Shelf | None = None
) -> None:
    """Raises what `tokens_from_proto` raises, and makes no tensor."""
    if message.shelf_name:
        message, data = _shelved(message, field, shelf)
        _checked_tokens(message, len(data), field)
    else:
        _checked_tokens(message, len(message.tokens.data), field)


def _shelved(
    message: encoder_pb2.CompressedVisualTokens, field: str, shelf: Shelf | None
) -> tuple[encoder_pb2.CompressedVisualTokens, memoryview]:
    """The message and the data that lie under a message's name."""
    found = shelf.get(message.shelf_name) if shelf else None
    if found is None:
        raise NotOnShelf("names nothing that is on the shelf of this node", field=f"{field}.shelf_name")
    return encoder_pb2.CompressedVisualTokens.FromString(found.header), found.data


def _checked_tokens(
    message: encoder_pb2.CompressedVisualTokens, size: int, field: str
) -> tuple[torch.dtype, tuple[int, ...]]:
    """Type and shape of the tokens, whose data has `size` bytes; checks all that the message says beside them."""
    dtype, shape = _checked(message.tokens, size, f"{field}.tokens")
    if len(shape) != 2:
        raise InvalidInput(f"has the shape {list(shape)}, expected [N, D]", field=f"{field}.tokens")
    height, width = message.map_height, message.map_width
    if message.uncompressed_tokens < max(1, height * (width + 1)):
        raise InvalidInput(
            f"is {message.uncompressed_tokens}, too few for a map of {height} x {width}",
            field=f"{field}.uncompressed_tokens",
        )
    if len(message.branch_ids) > height * width:
        raise InvalidInput(
            f"names {len(message.branch_ids)} regions in a map of {height} x {width}", field=f"{field}.branch_ids"
        )
    for name in ("content_hash", "model_fingerprint"):
        check_sha256(getattr(message, name), f"{field}.{name}")
    return dtype, shape


def check_sha256(value: str, field: str) -> None:
    """Raises InvalidInput unless `value` is a SHA-256 in lower-case hexadecimal."""
    if len(value) != 64 or not set(value) <= set("0123456789abcdef"):
        raise InvalidInput(f"is {value[:80]!r}, expected 64 hexadecimal digits", field=field)
