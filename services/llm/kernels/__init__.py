"""What a decoder's layers and the drawing of its tokens compute, by kind of device, and what a device gets.

Legend: S query tokens of a packed pass, K key tokens, H query heads, G key heads, d head width, n sequences,
B blocks of a block table. Every `H // G` consecutive query heads share one key head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from services.compute.linear import onednn_multiplies
from services.compute.processor import has_kernels
from services.llm.kernels.cpu_attention import CpuKernels
from services.llm.kernels.reference_attention import ReferenceKernels


class Kernels(Protocol):
    """Causal attention over packed prompts and over the paged KV cache; nothing keeps an S x K matrix."""

    def prefill(
        self,
        query_SHd: torch.Tensor,
        key_KGd: torch.Tensor,
        value_KGd: torch.Tensor,
        query_lens: Sequence[int],
        key_lens: Sequence[int],
        scaling: float,
    ) -> torch.Tensor:
        """Segments end to end, no padding: segment i's queries are the last query_lens[i] of its key_lens[i] tokens.

        Each query attends to the keys of its own segment up to its own position. The lengths sum to S and K, and
        0 <= query_lens[i] <= key_lens[i]. Inputs may be strided, but d is contiguous. Returns [S, H, d].
        """
        ...

    def decode(
        self,
        query_nHd: torch.Tensor,
        key_pool: torch.Tensor,
        value_pool: torch.Tensor,
        rows_nB: torch.Tensor,
        lengths_n: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """One query a sequence, over K and V in pages [rows, block_size, G, d].

        rows_nB: int64 block tables (rows of the pools), padded with a row that stays zero; lengths_n: int64 tokens to
        attend to, 1 or more, the new one included. What a page holds past a sequence's length must be finite and is
        never read into a result. Returns [n, H, d].
        """
        ...

    def store(
        self,
        key_SGd: torch.Tensor,
        value_SGd: torch.Tensor,
        key_pool: torch.Tensor,
        value_pool: torch.Tensor,
        slots_S: torch.Tensor,
    ) -> None:
        """Writes K and V into the pools [rows, block_size, G, d]: token i to slot slots_S[i] (int64) of row-major
        [rows * block_size]. Inputs may be strided, but d is contiguous."""
        ...


class Elementwise(Protocol):
    """What lies between a decoder layer's matrix products, each in one pass over memory."""

    def rms_norm(self, hidden_SD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        """RMS norm times the weight: [S, D]."""
        ...

    def rotate_(self, x_SHd: torch.Tensor, cos_Sd: torch.Tensor, sin_Sd: torch.Tensor) -> None:
        """Rotary embedding in place, the halves of a head as pairs."""
        ...

    def silu_mul_(self, gate_SD: torch.Tensor, up_SD: torch.Tensor) -> None:
        """silu(gate) * up, in place of gate."""
        ...


class AttentionStep(Protocol):
    """Attention of one packed pass through layers of one KV cache group."""

    final_rows: torch.Tensor | None
    """int64 [R]: the rows that are read after the model's last layer; None: all."""

    def attend(
        self, layer: int, query_SHd: torch.Tensor, key_SGd: torch.Tensor, value_SGd: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Stores K and V in the cache and returns the attention output [S, H, d].

        The last layer may bring the queries of `final_rows` only: then [R, H, d]. Inputs may be strided, d contiguous.
        """
        ...


def choose_elementwise(device: torch.device, dtype: torch.dtype) -> Elementwise | None:
    """The operators for this device and dtype; None where transformers' own layers are to run."""
    if onednn_multiplies(device, dtype):
        return torch.ops.focusllava if has_kernels(dtype) else None
    if device.type == "cuda":
        from services.llm.kernels import cuda_elementwise  # Triton comes with torch's CUDA builds only

        return cuda_elementwise
    return None


def choose_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest kernels that run on this device in this dtype."""
    if onednn_multiplies(device, dtype) and has_kernels(dtype):
        return CpuKernels()
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        from services.llm.kernels.cuda_attention import cuda_kernels

        return cuda_kernels(device)
    return ReferenceKernels()
