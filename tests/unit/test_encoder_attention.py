"""The vision tower's attention against the formula in float64, and a tile's independence from its batch."""

from __future__ import annotations

import pytest
import torch

from services.encoder.attention import vision_attention


def exact(query, key, value, scaling):
    scores = query.double() @ key.double().transpose(-1, -2) * scaling
    return (scores.softmax(-1) @ value.double()).transpose(1, 2)


def heads(tiles: int, tokens: int, width: int = 32, dtype=torch.bfloat16, spread: float = 1.0):
    """As transformers hands them over: [T, N, H, d] seen as [T, H, N, d]."""
    generator = torch.Generator().manual_seed(tokens)
    return [
        (torch.randn(tiles, tokens, 3, width, generator=generator) * spread).to(dtype).transpose(1, 2) for _ in "qkv"
    ]


@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 145])
@pytest.mark.parametrize("spread", [0.1, 1.0, 2.0])
def test_bf16_on_a_cpu_is_within_bf16_of_the_formula(tokens, spread):
    query, key, value = heads(3, tokens, spread=spread)
    value = value / spread
    with torch.inference_mode():
        out, weights = vision_attention(torch.nn.Module(), query, key, value, None, 32**-0.5)
    assert weights is None and out.shape == (3, tokens, 3, 32)
    difference = (out.double() - exact(query, key, value, 32**-0.5)).abs()
    assert difference.max() < 0.05 and difference.mean() < 0.005


def test_large_scores_neither_overflow_nor_lose_the_winner():
    query, key, value = heads(1, 64, spread=30.0)
    with torch.inference_mode():
        out, _ = vision_attention(torch.nn.Module(), query, key, value, None, 1.0)
    assert out.isfinite().all()
    winner = (query.double() @ key.double().transpose(-1, -2)).argmax(-1)
    expected = torch.gather(value, 2, winner[..., None].expand(-1, -1, -1, 32)).transpose(1, 2)
    assert ((out - expected).abs().amax(-1) < 0.5).double().mean() > 0.95


def test_a_tile_does_not_depend_on_its_batch():
    query, key, value = heads(4, 145)
    with torch.inference_mode():
        together, _ = vision_attention(torch.nn.Module(), query, key, value, None, 0.2)
        for tile in range(4):
            alone, _ = vision_attention(
                torch.nn.Module(), query[tile : tile + 1], key[tile : tile + 1], value[tile : tile + 1], None, 0.2
            )
            assert torch.equal(alone[0], together[tile])


def test_float32_and_training_are_exact_and_differentiable():
    query, key, value = heads(2, 37, dtype=torch.float32)
    with torch.inference_mode():
        out, _ = vision_attention(torch.nn.Module(), query, key, value, None, 0.2)
    torch.testing.assert_close(out.double(), exact(query, key, value, 0.2), rtol=1e-5, atol=1e-5)
    query = query.detach().bfloat16().requires_grad_()
    out, _ = vision_attention(torch.nn.Module(), query, key.bfloat16(), value.bfloat16(), None, 0.2)
    out.float().sum().backward()
    assert query.grad is not None and query.grad.isfinite().all()
