"""Attention on a GPU: torch's variable-length flash attention for prefill, cuda_paged_decode.py for decode.

Legend: see services/llm/kernels/__init__.py.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch

from services.llm.kernels.cuda_paged_decode import paged_decode, store

CAUSAL = (-1, 0)
"""Window (left, right) of `varlen_attn`: aligned to the last query and the last key of each segment."""


class CudaKernels:
    """bf16 and fp16. With another `attend` it runs on a CPU too, where Triton interprets (TRITON_INTERPRET=1)."""

    def __init__(self, attend: Callable[..., Any]):
        """attend: `torch.nn.attention.varlen.varlen_attn`, or what has its meaning."""
        self._attend = attend

    def prefill(
        self,
        query_SHd: torch.Tensor,
        key_KGd: torch.Tensor,
        value_KGd: torch.Tensor,
        query_lens: Sequence[int],
        key_lens: Sequence[int],
        scaling: float,
    ) -> torch.Tensor:
        device = query_SHd.device
        return self._attend(
            query_SHd,
            key_KGd,
            value_KGd,
            segment_starts(tuple(query_lens), device),
            segment_starts(tuple(key_lens), device),
            max(query_lens),
            max(key_lens),
            scale=scaling,
            window_size=CAUSAL,
            enable_gqa=query_SHd.shape[1] != key_KGd.shape[1],
        )

    def decode(
        self,
        query_nHd: torch.Tensor,
        key_pool: torch.Tensor,
        value_pool: torch.Tensor,
        rows_nB: torch.Tensor,
        lengths_n: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        return paged_decode(query_nHd, key_pool, value_pool, rows_nB, lengths_n, scaling)

    store = staticmethod(store)


@functools.lru_cache(maxsize=16)
def segment_starts(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int32 [segments + 1]: where each segment begins, and the end. Kept: every layer of a pass asks for the same."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return torch.tensor(starts, dtype=torch.int32, device=device)


def cuda_kernels(device: torch.device) -> CudaKernels:  # GPU only
    """Kernels on torch's flash attention 2, or 3 where the package flash_attn_interface and a Hopper GPU are there."""
    from torch.nn.attention import activate_flash_attention_impl
    from torch.nn.attention.varlen import varlen_attn

    if torch.cuda.get_device_capability(device)[0] == 9 and importlib.util.find_spec("flash_attn_interface"):
        activate_flash_attention_impl("FA3")
    return CudaKernels(varlen_attn)
