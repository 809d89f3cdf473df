"""Attention of the frozen vision tower on a CPU: SDPA, or in bf16 two matrix products a tile with a softmax between.

The second takes little more than half of SDPA's time, except where the processor has matrix units (AMX): SDPA's kernel
uses them, and takes half the time of the products. A tile's scores are few enough to stay in the processor's cache.

Legend: T tiles, N tokens of a tile, R those rounded up to `ALIGNED_TOKENS`, C ViT width, H heads, d head width.
"""

from __future__ import annotations

import torch
from torch import nn

SAMPLED_KEYS = 36
ALIGNED_TOKENS = 16
"""Rows of scores begin at multiples of so many: a tile of CLIP has 577 tokens, and products of 592 are faster."""


def attend(qkv_TN3C: torch.Tensor, heads: int, scaling: float) -> torch.Tensor:
    """Attention inside each tile, no mask, no gradient in bf16.

    qkv_TN3C: queries, keys and values side by side, [T, N, 3 * C]. Returns [T, N, C].
    """
    tiles, tokens, _ = qkv_TN3C.shape
    qkv_TN3Hd = qkv_TN3C.view(tiles, tokens, 3, heads, -1)
    if qkv_TN3C.dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported():
        return _by_tile(qkv_TN3Hd, scaling).flatten(2)
    query_THNd, key_THNd, value_THNd = qkv_TN3Hd.permute(2, 0, 3, 1, 4)
    out_THNd = nn.functional.scaled_dot_product_attention(query_THNd, key_THNd, value_THNd, scale=scaling)
    return out_THNd.transpose(1, 2).flatten(2)


def _by_tile(qkv_TN3Hd: torch.Tensor, scaling: float) -> torch.Tensor:
    """Each tile by itself, so a tile's result does not depend on its batch. Returns [T, N, H, d]."""
    tiles, tokens, _, heads, width = qkv_TN3Hd.shape
    rounded = -(-tokens // ALIGNED_TOKENS) * ALIGNED_TOKENS
    # One copy: the products would make one of each operand that is not contiguous by head.
    qkv_T3HRd = qkv_TN3Hd.new_empty(tiles, 3, heads, rounded, width)
    qkv_T3HRd[:, :, :, :tokens] = qkv_TN3Hd.permute(0, 2, 3, 1, 4)
    qkv_T3HRd[:, :, :, tokens:] = 0
    scores_HRR = qkv_TN3Hd.new_empty(heads, rounded, rounded)
    sums_HRd = qkv_TN3Hd.new_empty(heads, rounded, width)
    out_TNHd = qkv_TN3Hd.new_empty(tiles, tokens, heads, width)
    stride = max(1, tokens // SAMPLED_KEYS)
    for (query_HRd, key_HRd, value_HRd), out_NHd in zip(qkv_T3HRd, out_TNHd, strict=True):
        # Scores are rounded to bf16. Less a large score of the same query, subtracted before they are, those that weigh
        # in the softmax are near zero, where bf16 is fine.
        shift_HR = torch.bmm(key_HRd[:, :tokens:stride], query_HRd.transpose(1, 2)).amax(1).mul_(-scaling)
        scores_HRR.copy_(shift_HR.unsqueeze(-1))
        scores_HRR[:, :, tokens:] = -torch.inf
        torch.baddbmm(scores_HRR, query_HRd, key_HRd.transpose(1, 2), alpha=scaling, out=scores_HRR)
        torch.softmax(scores_HRR, dim=-1, out=scores_HRR)
        torch.bmm(scores_HRR, value_HRd, out=sums_HRd)
        out_NHd.copy_(sums_HRd[:, :tokens].transpose(0, 1))
    return out_TNHd
