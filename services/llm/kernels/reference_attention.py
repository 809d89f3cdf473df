"""Attention in plain torch: any device, any floating dtype; what the fast kernels are compared with.

Legend: see services/llm/kernels/__init__.py; R = H // G query heads a key head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

QUERY_BLOCK = 256


class ReferenceKernels:
    """Scaled dot-product attention, one segment and one block of queries at a time."""

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
        query_start = key_start = 0
        for queries, keys in zip(query_lens, key_lens, strict=True):
            query_HSd = query_SHd[query_start : query_start + queries].transpose(0, 1)
            key_GKd = key_KGd[key_start : key_start + keys].transpose(0, 1)
            value_GKd = value_KGd[key_start : key_start + keys].transpose(0, 1)
            for first in range(0, queries, QUERY_BLOCK):
                last = min(first + QUERY_BLOCK, queries)
                seen = keys - queries + last
                position = torch.arange(seen, device=query_SHd.device)
                mask_SK = position <= position[seen - (last - first) :, None]
                out_1HSd = F.scaled_dot_product_attention(
                    query_HSd[None, :, first:last],
                    key_GKd[None, :, :seen],
                    value_GKd[None, :, :seen],
                    attn_mask=mask_SK,
                    scale=scaling,
                    enable_gqa=True,
                )
                out_SHd[query_start + first : query_start + last] = out_1HSd[0].transpose(0, 1)
            query_start, key_start = query_start + queries, key_start + keys
        return out_SHd

    def decode(
        self,
        query_nHd: torch.Tensor,
        key_pool: torch.Tensor,
        value_pool: torch.Tensor,
        rows_nB: torch.Tensor,
        lengths_n: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        key_nGSd, value_nGSd = (
            pool.index_select(0, rows_nB.flatten()).unflatten(0, rows_nB.shape).flatten(1, 2).transpose(1, 2)
            for pool in (key_pool, value_pool)
        )
        position_S = torch.arange(key_nGSd.shape[2], device=query_nHd.device)
        mask_n11S = (position_S < lengths_n[:, None])[:, None, None, :]
        # The query heads of one key head take the place of query tokens, so K and V are not repeated.
        query_nGRd = query_nHd.unflatten(1, (key_nGSd.shape[1], -1))
        out_nGRd = F.scaled_dot_product_attention(query_nGRd, key_nGSd, value_nGSd, attn_mask=mask_n11S, scale=scaling)
        return out_nGRd.flatten(1, 2)

    def store(
        self,
        key_SGd: torch.Tensor,
        value_SGd: torch.Tensor,
        key_pool: torch.Tensor,
        value_pool: torch.Tensor,
        slots_S: torch.Tensor,
    ) -> None:
        key_pool.flatten(0, 1).index_copy_(0, slots_S, key_SGd)
        value_pool.flatten(0, 1).index_copy_(0, slots_S, value_SGd)
