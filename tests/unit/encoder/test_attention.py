"""The vision tower's attention on a CPU against the formula in float64, and a tile's independence from its batch."""

from __future__ import annotations

import pytest
import torch

from services.encoder.attention import attend

TORCH_THREADS = 2
HEADS, WIDTH = 3, 32


def exact(qkv: torch.Tensor, scaling: float) -> torch.Tensor:
    query, key, value = qkv.double().unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
    weights = (query @ key.transpose(-1, -2) * scaling).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2)


def joined(tiles: int, tokens: int, dtype: torch.dtype = torch.bfloat16, spread: float = 1.0) -> torch.Tensor:
    """Queries and keys of that standard deviation, values of 1, side by side."""
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(tiles, tokens, 3, HEADS * WIDTH, generator=generator)
    qkv[:, :, :2] *= spread
    return qkv.to(dtype).flatten(2)


@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 145])
@pytest.mark.parametrize("spread", [0.1, 1.0, 2.0])
@torch.inference_mode()
def test_bf16_is_within_bf16_of_the_formula(tokens, spread):
    qkv = joined(3, tokens, spread=spread)
    out = attend(qkv, HEADS, WIDTH**-0.5)
    assert out.shape == (3, tokens, HEADS * WIDTH) and out.is_contiguous()
    difference = (out.double() - exact(qkv, WIDTH**-0.5)).abs()
    assert difference.max() < 0.05 and difference.mean() < 0.005


@torch.inference_mode()
def test_negative_scores_leave_nothing_to_what_fills_up_a_row():
    """17 tokens are computed as 32: the 15 that are none would outweigh all others if their score were zero."""
    qkv = joined(2, 17).unflatten(-1, (3, -1))
    qkv[:, :, 0], qkv[:, :, 1] = 4.0, -4.0 - qkv[:, :, 1].abs()
    qkv = qkv.flatten(2)
    difference = (attend(qkv, HEADS, 1.0).double() - exact(qkv, 1.0)).abs()
    assert difference.max() < 0.05


@torch.inference_mode()
def test_large_scores_neither_overflow_nor_lose_the_winner():
    qkv = joined(1, 64, spread=30.0)
    out = attend(qkv, HEADS, 1.0)
    assert out.isfinite().all()
    difference = (out.double() - exact(qkv, 1.0)).abs().unflatten(-1, (HEADS, WIDTH)).amax(-1)
    assert (difference < 0.05).double().mean() > 0.95


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tile_does_not_depend_on_its_batch(dtype):
    qkv = joined(4, 145, dtype)
    together = attend(qkv, HEADS, 0.2)
    for tile in range(4):
        assert torch.equal(attend(qkv[tile : tile + 1], HEADS, 0.2)[0], together[tile])


@torch.inference_mode()
def test_float32_is_exact():
    qkv = joined(2, 37, torch.float32)
    torch.testing.assert_close(attend(qkv, HEADS, 0.2).double(), exact(qkv, 0.2), rtol=1e-5, atol=1e-5)
