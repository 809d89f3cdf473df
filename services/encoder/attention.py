"""Attention of the vision tower: SDPA, but for bf16 on a CPU two matrix products a tile with a softmax between.

SDPA's CPU kernel takes twice as long there: a tile's scores are few enough to stay in the processor's cache.

Legend: T tiles, H heads, N tokens of a tile, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

ATTENTION_NAME = "focusllava_vision"
SAMPLED_KEYS = 36


def vision_attention(
    module: nn.Module,
    query_THNd: torch.Tensor,
    key_THNd: torch.Tensor,
    value_THNd: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface, no mask, no causality; returns [T, N, H, d]."""
    assert attention_mask is None
    query = query_THNd
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and not torch.is_grad_enabled():
        return _by_tile(query, key_THNd, value_THNd, scaling).transpose(1, 2), None
    out_THNd = nn.functional.scaled_dot_product_attention(query, key_THNd, value_THNd, dropout_p=dropout, scale=scaling)
    return out_THNd.transpose(1, 2).contiguous(), None


def _by_tile(
    query_THNd: torch.Tensor, key_THNd: torch.Tensor, value_THNd: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Each tile by itself, so a tile's result does not depend on its batch."""
    heads, tokens = query_THNd.shape[1:3]
    out_THNd = torch.empty(query_THNd.shape, dtype=query_THNd.dtype)
    stride = max(1, tokens // SAMPLED_KEYS)
    scores_HNN = torch.empty(heads, tokens, tokens, dtype=query_THNd.dtype)
    for query_HNd, key_HNd, value_HNd, out_HNd in zip(query_THNd, key_THNd, value_THNd, out_THNd, strict=True):
        key_HdN = key_HNd.transpose(1, 2)
        # Scores are rounded to bf16. Less a large score of the same query, subtracted before they are, those that weigh
        # in the softmax are near zero, where bf16 is fine.
        shift_HN1 = torch.bmm(query_HNd, key_HdN[..., ::stride]).amax(-1, keepdim=True).mul_(-scaling)
        torch.baddbmm(shift_HN1.expand(-1, -1, tokens), query_HNd, key_HdN, alpha=scaling, out=scores_HNN)
        torch.softmax(scores_HNN, dim=-1, out=scores_HNN)
        torch.bmm(scores_HNN, value_HNd, out=out_HNd)
    return out_THNd


AttentionInterface.register(ATTENTION_NAME, vision_attention)
