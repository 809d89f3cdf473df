"""Tensors and visual tokens <-> protobuf."""

from __future__ import annotations

import math
import sys

import numpy as np
import torch

from focusllava.v1 import encoder_pb2, tensor_pb2
from services.common.errors import InvalidInput
from services.common.types import CompressedVisualTokens

assert sys.byteorder == "little", "tensors are little-endian on the wire"

MAX_DIMENSIONS = 8
_DTYPES = {
    tensor_pb2.DATA_TYPE_FLOAT32: torch.float32,
    tensor_pb2.DATA_TYPE_FLOAT16: torch.float16,
    tensor_pb2.DATA_TYPE_BFLOAT16: torch.bfloat16,
    tensor_pb2.DATA_TYPE_UINT8: torch.uint8,
}
_DATA_TYPES = {dtype: data_type for data_type, dtype in _DTYPES.items()}


def tensor_to_proto(tensor: torch.Tensor, into: tensor_pb2.Tensor | None = None) -> tensor_pb2.Tensor:
    """A tensor of 1 to 8 dimensions, none of them 0; float32, float16, bfloat16 or uint8, on any device.

    into: an empty message to fill. A message that becomes a field of another is copied, and this one may have 24 MB.
    """
    assert tensor.dtype in _DATA_TYPES, f"{tensor.dtype} has no type on the wire"
    assert 1 <= tensor.ndim <= MAX_DIMENSIONS and tensor.numel(), f"shape {tuple(tensor.shape)} cannot cross the wire"
    # numpy has no bfloat16: the bytes are read through a view.
    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    message = tensor_pb2.Tensor() if into is None else into
    message.data_type, message.data = _DATA_TYPES[tensor.dtype], data
    message.shape.extend(tensor.shape)
    return message


def tensor_from_proto(message: tensor_pb2.Tensor, field: str = "tensor") -> torch.Tensor:
    """Raises InvalidInput: unknown type, a shape that is not 1 to 8 positive sizes or does not match the bytes.

    NaN and infinity pass: the engine's intake looks for them once, in the dtype that the model computes in.
    """
    dtype = _DTYPES.get(message.data_type)
    if dtype is None:
        known = ", ".join(tensor_pb2.DataType.Name(value) for value in _DTYPES)
        raise InvalidInput(f"is {message.data_type}, expected one of {known}", field=f"{field}.data_type")
    shape = tuple(message.shape)
    if not 1 <= len(shape) <= MAX_DIMENSIONS:
        raise InvalidInput(f"has {len(shape)} dimensions, expected 1 to {MAX_DIMENSIONS}", field=f"{field}.shape")
    if any(size < 1 for size in shape):
        raise InvalidInput(f"is {list(shape)}, expected sizes of at least 1", field=f"{field}.shape")
    data = message.data
    expected = math.prod(shape) * dtype.itemsize  # Python's integers cannot overflow
    if len(data) != expected:
        found = f"has {len(data)} bytes, expected {expected} for shape {list(shape)} of {dtype}"
        raise InvalidInput(found, field=f"{field}.data")
    # One copy: torch wants memory that may be written, and bytes may not.
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)


def tokens_to_proto(
    tokens: CompressedVisualTokens, into: encoder_pb2.CompressedVisualTokens | None = None
) -> encoder_pb2.CompressedVisualTokens:
    """Visual tokens as a message; into: an empty one to fill, as in `tensor_to_proto`."""
    message = encoder_pb2.CompressedVisualTokens() if into is None else into
    tensor_to_proto(tokens.tokens_ND, message.tokens)
    message.branch_ids = tokens.branch_ids_M.cpu().numpy().astype(np.uint8).tobytes()
    message.map_height, message.map_width = tokens.map_hw
    message.uncompressed_tokens = tokens.uncompressed_tokens
    message.content_hash, message.model_fingerprint = tokens.content_hash, tokens.model_fingerprint
    message.notes.extend(tokens.notes)
    return message


def tokens_from_proto(
    message: encoder_pb2.CompressedVisualTokens, field: str = "visual_tokens"
) -> CompressedVisualTokens:
    """Raises InvalidInput for a bad tensor, counts that contradict each other, or a hash that is not SHA-256."""
    tokens_ND = tensor_from_proto(message.tokens, f"{field}.tokens")
    if tokens_ND.ndim != 2 or not tokens_ND.is_floating_point():
        raise InvalidInput(
            f"is {tokens_ND.dtype} of shape {list(tokens_ND.shape)}, expected floats of shape [N, D]",
            field=f"{field}.tokens",
        )
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
    return CompressedVisualTokens(
        tokens_ND=tokens_ND,
        branch_ids_M=torch.from_numpy(np.frombuffer(message.branch_ids, np.uint8).copy()),
        map_hw=(height, width),
        uncompressed_tokens=message.uncompressed_tokens,
        content_hash=message.content_hash,
        model_fingerprint=message.model_fingerprint,
        notes=tuple(message.notes),
    )


def check_sha256(value: str, field: str) -> None:
    """Raises InvalidInput unless `value` is a SHA-256 in lower-case hexadecimal."""
    if len(value) != 64 or not set(value) <= set("0123456789abcdef"):
        raise InvalidInput(f"is {value[:80]!r}, expected 64 hexadecimal digits", field=field)
