"""Attention on a CPU: the operators in services/compute/cpp. Legend: see services/llm/kernels/__init__.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from services.compute import native
from services.llm.kernels.reference_attention import ReferenceKernels


class CpuKernels(ReferenceKernels):
    """bf16 and fp32, even head widths, where `native.load()` says that they can be had."""

    def __init__(self) -> None:
        assert native.load()

    def prefill(
        self,
        query_SHd: torch.Tensor,
        key_KGd: torch.Tensor,
        value_KGd: torch.Tensor,
        query_lens: Sequence[int],
        key_lens: Sequence[int],
        scaling: float,
    ) -> torch.Tensor:
        return torch.ops.focusllava.packed_attention(
            query_SHd, key_KGd, value_KGd, query_lens, key_lens, scaling, causal=True
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
        return torch.ops.focusllava.decode_attention(query_nHd, key_pool, value_pool, rows_nB, lengths_n, scaling)
