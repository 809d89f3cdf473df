"""Attention on a CPU: matrix products in blocks with a softmax between, the masked part skipped.

SDPA's CPU kernel reaches a sixth of the processor's bf16 rate on long prompts and half of its fp32 rate; oneDNN's
products nearly all of either. In bf16 they round their result to 8 bits, though: a score of 16 would be off by 0.03. So
each query's scores are taken relative to its largest score among every 8th key, subtracted inside the product where
sums are still fp32. What weighs in the softmax is then near zero, where bf16 is fine.

Legend: see services/llm/kernels/__init__.py; R = H // G query heads a key head, Q queries of a block, X = R * Q.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from services.llm.kernels.reference import ReferenceKernels

QUERY_BLOCK = 256
SAMPLED_KEY_STRIDE = 8
SCORES_PER_PASS = 8 * 2**20
"""Most bf16 scores at once (16 MiB): key heads take turns beyond it, so that they stay in the cache."""
SHORT_KEYS = 96
"""Up to this many keys, a segment is one call of SDPA: the calls cost more than the arithmetic."""
PADDED_DECODE_TOKENS = 128
"""Up to this length, sequences decode in one padded batch, for the same reason."""


class CpuKernels:
    """bf16 and fp32, where oneDNN multiplies in them. One thread at a time: scratch memory is kept."""

    def __init__(self, dtype: torch.dtype):
        self._short = ReferenceKernels()
        self._segment = self._segment_bf16 if dtype == torch.bfloat16 else self._segment_fp32
        self._scores = torch.empty(0, dtype=dtype)
        self._pages = (torch.empty(0, dtype=dtype), torch.empty(0, dtype=dtype))
        self._masked_QQ = torch.ones(QUERY_BLOCK, QUERY_BLOCK, dtype=torch.bool).triu(1)

    def prefill(
        self,
        query_SHd: torch.Tensor,
        key_KGd: torch.Tensor,
        value_KGd: torch.Tensor,
        query_lens: Sequence[int],
        key_lens: Sequence[int],
        scaling: float,
    ) -> torch.Tensor:
        out_SHd = torch.empty_like(query_SHd, memory_format=torch.contiguous_format)
        query_parts, out_parts = query_SHd.split(list(query_lens)), out_SHd.split(list(query_lens))
        key_parts, value_parts = key_KGd.split(list(key_lens)), value_KGd.split(list(key_lens))
        for query, key, value, out in zip(query_parts, key_parts, value_parts, out_parts, strict=True):
            if len(key) <= SHORT_KEYS:
                out.copy_(self._short.prefill(query, key, value, [len(query)], [len(key)], scaling))
            else:
                self._segment(query, key, value, scaling, out)
        return out_SHd

    def _segment_bf16(
        self, query_SHd: torch.Tensor, key_KGd: torch.Tensor, value_KGd: torch.Tensor, scaling: float, out: torch.Tensor
    ) -> None:
        (heads, width), (keys, groups) = query_SHd.shape[1:], key_KGd.shape[:2]
        repeats = heads // groups
        # Two more columns carry the shift: (q, -m, 0) . (k, 1, 0) = q . k - m.
        key_GKd = key_KGd.new_empty(groups, keys, width + 2)
        key_GKd[..., :width] = key_KGd.transpose(0, 1)
        key_GKd[..., width], key_GKd[..., width + 1] = 1, 0
        value_GKd = value_KGd.transpose(0, 1).contiguous()
        for block, seen in _blocks(len(query_SHd), keys):
            rows = block.stop - block.start
            query_GRQd = query_SHd.new_empty(groups, repeats, rows, width + 2)
            query_GRQd[..., :width] = query_SHd[block].permute(1, 0, 2).unflatten(0, (groups, repeats))
            query_GXd = query_GRQd.flatten(1, 2)
            sampled_GdK = key_GKd[:, :seen:SAMPLED_KEY_STRIDE, :width].transpose(1, 2)
            query_GXd[..., width] = torch.bmm(query_GXd[..., :width], sampled_GdK).amax(dim=-1).neg_()
            query_GXd[..., width + 1] = 0
            at_once = max(1, SCORES_PER_PASS // (repeats * rows * seen))
            for head in range(0, groups, at_once):
                part = slice(head, min(head + at_once, groups))
                # The same memory again and again: fresh pages would cost as much as the product.
                scores_GXK = _scratch(self._scores, part.stop - part.start, repeats * rows, seen)
                key_GdK = key_GKd[part, :seen].transpose(1, 2)
                torch.baddbmm(scores_GXK, query_GXd[part], key_GdK, beta=0, alpha=scaling, out=scores_GXK)
                self._softmax(scores_GXK, rows)
                out_GXd = torch.bmm(scores_GXK, value_GKd[part, :seen])
                out_QGRd = out_GXd.unflatten(1, (repeats, rows)).permute(2, 0, 1, 3)
                out[block].unflatten(1, (groups, repeats))[:, part] = out_QGRd

    def _segment_fp32(
        self, query_SHd: torch.Tensor, key_KGd: torch.Tensor, value_KGd: torch.Tensor, scaling: float, out: torch.Tensor
    ) -> None:
        (heads, width), (keys, groups) = query_SHd.shape[1:], key_KGd.shape[:2]
        repeats = heads // groups
        # fp32 reaches oneDNN through its linear layer, a key head at a time: K and V^T are the weights.
        key_GKd, value_GdK = key_KGd.transpose(0, 1).contiguous(), value_KGd.permute(1, 2, 0).contiguous()
        for block, seen in _blocks(len(query_SHd), keys):
            rows = block.stop - block.start
            query_GXd = (query_SHd[block] * scaling).permute(1, 0, 2).reshape(groups, repeats * rows, width)
            for head in range(groups):
                scores_XK = _matmul_fp32(query_GXd[head], key_GKd[head, :seen])
                self._softmax(scores_XK[None], rows)
                # oneDNN has no fast kernel for weights with gaps between their rows.
                out_Xd = _matmul_fp32(scores_XK, value_GdK[head, :, :seen].contiguous())
                out_QRd = out_Xd.unflatten(0, (repeats, rows)).transpose(0, 1)
                out[block].unflatten(1, (groups, repeats))[:, head] = out_QRd

    def _softmax(self, scores_GXK: torch.Tensor, rows: int) -> None:
        """In place; the last `rows` keys are those of the block's own queries."""
        own_GRQQ = scores_GXK.unflatten(1, (-1, rows))[..., -rows:]
        own_GRQQ.masked_fill_(self._masked_QQ[:rows, :rows], -torch.inf)
        torch.softmax(scores_GXK, dim=-1, out=scores_GXK)

    def decode(
        self,
        query_nHd: torch.Tensor,
        key_pool: torch.Tensor,
        value_pool: torch.Tensor,
        rows_nB: torch.Tensor,
        lengths_n: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        size, groups, width = key_pool.shape[1:]
        lengths = lengths_n.tolist()
        blocks = [-(-length // size) for length in lengths]
        if max(lengths) <= PADDED_DECODE_TOKENS:
            rows_nB = rows_nB[:, : max(blocks)]
            return self._short.decode(query_nHd, key_pool, value_pool, rows_nB, lengths_n, scaling)
        # One sequence at a time: what is gathered is still in the cache when it is read, and nothing is padded.
        query_nGRd = query_nHd.unflatten(1, (groups, -1))
        out_nHd = torch.empty_like(query_nHd, memory_format=torch.contiguous_format)
        for index, (length, count) in enumerate(zip(lengths, blocks, strict=True)):
            row_B = rows_nB[index, :count]
            key_1GKd, value_1GKd = (
                torch.index_select(pool, 0, row_B, out=_scratch(pages, count, size, groups, width))
                .view(1, count * size, groups, width)[:, :length]
                .transpose(1, 2)
                for pool, pages in zip((key_pool, value_pool), self._pages, strict=True)
            )
            # The query heads of one key head take the place of query tokens, so K and V are not repeated.
            query_1GRd = query_nGRd[index : index + 1]
            out_1GRd = F.scaled_dot_product_attention(query_1GRd, key_1GKd, value_1GKd, scale=scaling)
            out_nHd[index] = out_1GRd.view(query_nHd.shape[1:])
        return out_nHd


def _blocks(queries: int, keys: int) -> Iterator[tuple[slice, int]]:
    """Blocks of queries, each with the keys that its last query sees."""
    for first in range(0, queries, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, queries)
        yield slice(first, last), keys - queries + last


def _scratch(memory: torch.Tensor, *shape: int) -> torch.Tensor:
    """A view of `memory`, which grows to the largest size ever asked for."""
    size = torch.Size(shape).numel()
    if memory.numel() < size:
        memory.resize_(size)
    return memory[:size].view(shape)


def _matmul_fp32(x_MK: torch.Tensor, y_NK: torch.Tensor) -> torch.Tensor:
    """x y^T: twice as fast through oneDNN as through the BLAS behind torch.mm on processors that are not Intel's."""
    return torch.ops.mkldnn._linear_pointwise(x_MK, y_NK, None, "none", [], "")
