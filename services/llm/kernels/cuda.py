"""Attention on a GPU by torch's variable-length flash attention.

Prefill hands the packed segments over as they are. Decode reads the pages in place where flash attention 3 is
installed (Hopper; the flash attention 2 that torch brings has no block tables); elsewhere it copies the pages of each
sequence side by side first. Its shapes depend on the batch and the width of the block tables alone, so a CUDA graph
can hold it.

Legend: see services/llm/kernels/__init__.py.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch

CAUSAL, ALL = (-1, 0), (-1, -1)
"""Window sizes (left, right) of `varlen_attn`; causal is aligned to the last query and key of each segment."""


class CudaKernels:
    """bf16 and fp16. Everything below the constructor also runs on a CPU, with another `attend`."""

    def __init__(self, attend: Callable[..., Any], *, reads_pages: bool):
        """attend: `torch.nn.attention.varlen.varlen_attn`; reads_pages: whether it takes a block table."""
        self._attend, self._reads_pages = attend, reads_pages

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
        (sequences, blocks), size, device = rows_nB.shape, key_pool.shape[1], query_nHd.device
        query_starts = torch.arange(sequences + 1, dtype=torch.int32, device=device)
        key_starts, block_table = None, None
        if self._reads_pages:
            key, value, block_table = key_pool, value_pool, rows_nB.to(torch.int32)
        else:
            key, value = (pool.index_select(0, rows_nB.flatten()).flatten(0, 1) for pool in (key_pool, value_pool))
            key_starts = query_starts * (blocks * size)
        return self._attend(
            query_nHd,
            key,
            value,
            query_starts,
            key_starts,
            1,
            blocks * size,
            scale=scaling,
            window_size=ALL,
            enable_gqa=query_nHd.shape[1] != key_pool.shape[2],
            seqused_k=lengths_n.to(torch.int32),
            block_table=block_table,
        )


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

    reads_pages = False
    if torch.cuda.get_device_capability(device)[0] == 9 and importlib.util.find_spec("flash_attn_interface"):
        activate_flash_attention_impl("FA3")
        reads_pages = True
    return CudaKernels(varlen_attn, reads_pages=reads_pages)
