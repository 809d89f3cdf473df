"""Tensors and visual tokens on the wire: exact round trips, and everything malformed is refused by name."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from focusllava.v1 import encoder_pb2, tensor_pb2
from services.common import wire
from services.common.errors import InvalidInput
from services.common.int8 import to_int8
from services.common.types import CompressedVisualTokens

FINGERPRINT = "ab" * 32


def visual_tokens(dtype: torch.dtype = torch.bfloat16, **changes: object) -> CompressedVisualTokens:
    tokens = CompressedVisualTokens(
        tokens_ND=torch.randn(11, 6, generator=torch.Generator().manual_seed(0)).to(dtype),
        branch_ids_M=torch.tensor([0, 2, 1], dtype=torch.uint8),
        map_hw=(4, 9),
        uncompressed_tokens=56,
        content_hash="0f" * 32,
        model_fingerprint=FINGERPRINT,
        notes=("animated image: first frame used", "ü"),
        image_size_hw=(41, 83),
        base_branch_ids_M=torch.tensor([1, 0], dtype=torch.uint8),
    )
    return dataclasses.replace(tokens, **changes)


def same_tokens(left: CompressedVisualTokens, right: CompressedVisualTokens) -> bool:
    tensors = ("tokens_ND", "branch_ids_M", "base_branch_ids_M")
    rest = [f.name for f in dataclasses.fields(left) if f.name not in tensors]
    return (
        all(getattr(left, n).dtype == getattr(right, n).dtype for n in tensors)
        and all(torch.equal(getattr(left, n), getattr(right, n)) for n in tensors)
        and all(getattr(left, n) == getattr(right, n) for n in rest)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_visual_tokens_round_trip_is_exact(dtype: torch.dtype) -> None:
    tokens = visual_tokens(dtype)
    message = encoder_pb2.CompressedVisualTokens.FromString(wire.tokens_to_proto(tokens).SerializeToString())
    back = wire.tokens_from_proto(message)
    assert same_tokens(back, tokens)
    back.tokens_ND.zero_()  # the result is its own memory
    assert same_tokens(wire.tokens_from_proto(message), tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_tokens_come_back_with_their_scales(dtype: torch.dtype) -> None:
    values_ND = torch.randn(5, 192, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 40, 0.01]).repeat(
        64
    )
    tokens_ND, scales_NG = to_int8(values_ND)
    tokens = visual_tokens(tokens_ND=tokens_ND, scales_NG=scales_NG)
    message = wire.tokens_to_proto(tokens)
    assert len(message.tokens.data) == wire.data_bytes((5, 192), torch.int8) == 5 * 192 + 5 * 3 * 4
    back = wire.tokens_from_proto(message)
    assert torch.equal(back.tokens_ND, tokens_ND) and torch.equal(back.scales_NG, scales_NG)
    assert torch.equal(back.values_ND(dtype), tokens.values_ND(dtype)) and back.values_ND(dtype).dtype is dtype


def test_a_view_is_sent_in_row_major_order() -> None:
    tensor = torch.arange(12, dtype=torch.float32).view(3, 4).T[1:]
    assert not tensor.is_contiguous()
    back = wire.tokens_from_proto(wire.tokens_to_proto(visual_tokens(tokens_ND=tensor)))
    assert torch.equal(back.tokens_ND, tensor)


def test_bytes_are_little_endian_bfloat16() -> None:
    message = wire.tokens_to_proto(visual_tokens(tokens_ND=torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16)))
    assert message.tokens.data == bytes([0x80, 0x3F, 0x00, 0xC0])


def tensor_message(**changes: object) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(
        **{"data_type": tensor_pb2.DATA_TYPE_FLOAT32, "shape": [2, 3], "data": bytes(24), **changes}
    )


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"data_type": 0}, "t.data_type"),
        ({"data_type": 99}, "t.data_type"),
        ({"shape": []}, "t.shape"),
        ({"shape": [1] * 9, "data": bytes(4)}, "t.shape"),
        ({"shape": [2, -3]}, "t.shape"),
        ({"shape": [-2, -3]}, "t.shape"),
        ({"shape": [0, 3], "data": b""}, "t.shape"),
        ({"shape": [2**62, 2**62]}, "t.data"),
        # 2**62 * 4 * 4 bytes is 0 modulo 2**64.
        ({"shape": [2**62, 4], "data": b""}, "t.data"),
        ({"data": bytes(23)}, "t.data"),
        ({"data": bytes(25)}, "t.data"),
        ({"data": bytes(12)}, "t.data"),
        ({"data_type": tensor_pb2.DATA_TYPE_BFLOAT16}, "t.data"),
        ({"data_type": tensor_pb2.DATA_TYPE_UINT8, "data": bytes(6)}, "t.data_type"),
        ({"data_type": tensor_pb2.DATA_TYPE_SCALED_INT8, "data": bytes(6)}, "t.shape"),
        ({"data_type": tensor_pb2.DATA_TYPE_SCALED_INT8, "shape": [2, 64], "data": bytes(128)}, "t.data"),
        ({"data_type": tensor_pb2.DATA_TYPE_SCALED_INT8, "shape": [2**62, 64], "data": bytes(128)}, "t.data"),
        ({"shape": [3, 4, 5], "data": bytes(240)}, "t"),
    ],
)
def test_malformed_tensor_is_refused_by_field(changes: dict[str, object], field: str) -> None:
    message = wire.tokens_to_proto(visual_tokens())
    message.tokens.CopyFrom(tensor_message(**changes))
    with pytest.raises(InvalidInput) as caught:
        wire.tokens_from_proto(message, "t")
    assert caught.value.field == field.replace("t", "t.tokens", 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("uncompressed_tokens", 39),
        ("uncompressed_tokens", 0),
        ("branch_ids", bytes(37)),
        ("content_hash", "0f" * 31),
        ("content_hash", "zz" * 32),
        ("model_fingerprint", ""),
    ],
)
def test_contradicting_visual_tokens_are_refused(name: str, value: object) -> None:
    message = wire.tokens_to_proto(visual_tokens())
    setattr(message, name, value)
    with pytest.raises(InvalidInput) as caught:
        wire.tokens_from_proto(message, "images[1]")
    assert caught.value.field == f"images[1].{name}"


def test_missing_tensor_is_refused() -> None:
    with pytest.raises(InvalidInput, match="visual_tokens.tokens.data_type"):
        wire.tokens_from_proto(encoder_pb2.CompressedVisualTokens())
