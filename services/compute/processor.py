"""What this machine's processor computes, and in which dtypes. The one place that decides it.

Each operator is asked once, for a tiny product at its first use, and the result is compared: an instruction set is no
promise. oneDNN has operators that no processor without AVX-512's bf16 instructions can run, and says so only when they
are called. What does not compute is left out by whoever would choose it, so that no request meets it.

Legend: M tokens, N outputs, K inputs.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch

from services.common.logs import LOGGER
from services.compute import native

log = logging.getLogger(LOGGER)


@functools.cache
def has_onednn_linear(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies weights in its own layout in this dtype, at a speed worth it."""
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16):
        return False
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    x_MK, weight_NK = _small(5, 64, dtype), _small(32, 64, dtype)

    def product() -> torch.Tensor:
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight_NK, len(x_MK))
        return torch.ops.mkldnn._linear_pointwise(x_MK, reordered, None, "none", [], "")

    return _computes(f"oneDNN's linear layer in {dtype}", product, x_MK.double() @ weight_NK.double().T)


@functools.cache
def has_int8_linear() -> bool:
    """Whether oneDNN multiplies int8 by int8 exactly, at a speed worth it (AVX-512 VNNI)."""
    if not torch.backends.mkldnn.is_available() or not torch.cpu._is_vnni_supported():
        return False
    # The largest codes: without VNNI sums of two products are kept in 16 bits, which these do not fit.
    codes_MK, weight_NK = torch.full((5, 64), 255, dtype=torch.uint8), torch.full((32, 64), 127, dtype=torch.int8)

    def product() -> torch.Tensor:
        reordered = torch.ops.onednn.qlinear_prepack(weight_NK, list(codes_MK.shape))
        ones_N, zeros_N = torch.ones(32), torch.zeros(32, dtype=torch.int32)
        return torch.ops.onednn.qlinear_pointwise(
            codes_MK, 1.0, 0, reordered, ones_N, zeros_N, None, 1.0, 0, torch.float32, "none", [], ""
        )

    return _computes("oneDNN's linear layer in int8", product, codes_MK.double() @ weight_NK.double().T)


@functools.cache
def has_kernels(dtype: torch.dtype) -> bool:
    """Whether this project's compiled attention is there and computes in this dtype: prefill and decode."""
    if dtype not in (torch.float32, torch.bfloat16) or not native.load():
        return False
    query_KHd, key_KGd, value_KGd = (_small(9, heads * 32, dtype).unflatten(1, (heads, 32)) for heads in (4, 2, 2))
    query, key, value = (x.double().transpose(0, 1)[None] for x in (query_KHd, key_KGd, value_KGd))
    exact = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.2, enable_gqa=True
    )[0].transpose(0, 1)
    rows_nB, lengths_n = torch.zeros(9, 1, dtype=torch.int64), torch.arange(1, 10)
    ops = torch.ops.focusllava

    def prefill() -> torch.Tensor:
        return ops.packed_attention(query_KHd, key_KGd, value_KGd, [9], [9], 0.2, True)

    def decode() -> torch.Tensor:
        return ops.decode_attention(query_KHd, key_KGd[None], value_KGd[None], rows_nB, lengths_n, 0.2)

    return all(_computes(f"compiled attention in {dtype}", attend, exact) for attend in (prefill, decode))


@functools.cache
def has_panels(dtype: torch.dtype) -> bool:
    """Whether this project's own matrix products are there and the fastest for few tokens in this dtype."""
    return has_kernels(dtype) and torch.ops.focusllava.has_panels(dtype)


def has_matrix_units() -> bool:
    """Whether the processor has matrix units (AMX), which oneDNN and SDPA use."""
    return torch.cpu._is_amx_tile_supported()


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether the processor has instructions that multiply in bfloat16; elsewhere a product in it takes up to 50 times
    as long as in float32."""
    if not torch.backends.mkldnn.is_available() or not torch.cpu._is_avx512_bf16_supported():
        return False
    # oneDNN may have been told to do without them, and says so of this product alone.
    return not native.load() or torch.ops.focusllava.has_brgemm(torch.bfloat16)


def _small(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers between -1 and 1, from a formula: nobody's random numbers change."""
    return torch.arange(rows * columns).mul(0.7).sin().to(dtype).view(rows, columns)


def _computes(name: str, operator: Callable[[], torch.Tensor], exact: torch.Tensor) -> bool:
    """Whether the operator's result is the exact one, but for rounding. Why not goes to the log."""
    try:
        with torch.inference_mode():
            error = (operator().double() - exact).abs().max() / exact.abs().max()
    except RuntimeError as failure:
        log.warning("this processor does without %s: %s", name, failure)
        return False
    if not error < 0.02:
        log.warning("this processor does without %s, whose result is wrong by %s of its size", name, float(error))
        return False
    return True
