"""What lies between a decoder layer's matrix products, on a GPU: each one kernel and one pass over memory.

By hand, for torch.compile compiles at the first request, and may again for new shapes.

Legend: S tokens, D width, H heads, d head width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024
"""Elements of a program that takes a piece of a token."""
HEADS = 8
"""Heads of a token that one program rotates: those of a single decoding token are shared out among four or more."""


def rms_norm(hidden_SD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """See `Elementwise`. hidden is contiguous."""
    out_SD = torch.empty_like(hidden_SD)
    tokens, width = hidden_SD.shape
    if tokens:
        padded = triton.next_power_of_2(width)
        _rms_norm[(tokens,)](hidden_SD, weight_D, out_SD, eps, width=width, padded=padded, num_warps=8)
    return out_SD


def rotate_(x_SHd: torch.Tensor, cos_Sd: torch.Tensor, sin_Sd: torch.Tensor) -> None:
    """See `Elementwise`. x may be strided, d contiguous; cos and sin are contiguous."""
    tokens, heads, width = x_SHd.shape
    if tokens == 0:
        return
    half = width // 2
    _rotate[tokens, triton.cdiv(heads, HEADS)](
        x_SHd,
        cos_Sd,
        sin_Sd,
        *x_SHd.stride()[:2],
        heads,
        half=half,
        padded_half=triton.next_power_of_2(half),
        some_heads=HEADS,
    )


def silu_mul_(gate_SD: torch.Tensor, up_SD: torch.Tensor) -> None:
    """See `Elementwise`. Both contiguous in D: they may be the halves of one product."""
    tokens, width = gate_SD.shape
    if tokens:
        _silu_mul[tokens, triton.cdiv(width, BLOCK)](
            gate_SD, up_SD, gate_SD.stride(0), up_SD.stride(0), width, block=BLOCK
        )


@triton.jit
def _rms_norm(hidden_SD, weight_D, out_SD, eps, width: tl.constexpr, padded: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, padded)
    hidden = tl.load(hidden_SD + token * width + j, mask=j < width, other=0.0).to(tl.float32)
    weight = tl.load(weight_D + j, mask=j < width, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(hidden * hidden, 0) / width + eps)
    tl.store(out_SD + token * width + j, (hidden * scale * weight).to(out_SD.dtype.element_ty), mask=j < width)


@triton.jit
def _rotate(
    x_SHd,
    cos_Sd,
    sin_Sd,
    stride_S,
    stride_H,
    heads,
    half: tl.constexpr,
    padded_half: tl.constexpr,
    some_heads: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * some_heads + tl.arange(0, some_heads)
    j = tl.arange(0, padded_half)
    in_Hd = (head < heads)[:, None] & (j < half)[None, :]
    low_Hd = x_SHd + token * stride_S + head[:, None] * stride_H + j[None, :]
    cos, sin = cos_Sd + token * 2 * half + j, sin_Sd + token * 2 * half + j
    low, high = tl.load(low_Hd, mask=in_Hd).to(tl.float32), tl.load(low_Hd + half, mask=in_Hd).to(tl.float32)
    cos_low, cos_high = tl.load(cos, mask=j < half).to(tl.float32), tl.load(cos + half, mask=j < half).to(tl.float32)
    sin_low, sin_high = tl.load(sin, mask=j < half).to(tl.float32), tl.load(sin + half, mask=j < half).to(tl.float32)
    dtype = x_SHd.dtype.element_ty
    tl.store(low_Hd, (low * cos_low[None, :] - high * sin_low[None, :]).to(dtype), mask=in_Hd)
    tl.store(low_Hd + half, (high * cos_high[None, :] + low * sin_high[None, :]).to(dtype), mask=in_Hd)


@triton.jit
def _silu_mul(gate_SD, up_SD, gate_stride, up_stride, width, block: tl.constexpr):
    token, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    gate_j = gate_SD + token * gate_stride + j
    gate = tl.load(gate_j, mask=j < width, other=0.0).to(tl.float32)
    up = tl.load(up_SD + token * up_stride + j, mask=j < width, other=0.0).to(tl.float32)
    tl.store(gate_j, (gate * tl.sigmoid(gate) * up).to(gate_SD.dtype.element_ty), mask=j < width)
