"""Attention of the frozen vision tower on a CPU: SDPA, or in bf16 the compiled operator of the LLM's prefill.

SDPA takes over twice as long, except where the processor has matrix units (AMX), which its kernel uses.

Legend: T tiles, N tokens of a tile, C ViT width, H heads, d head width.
"""

from __future__ import annotations

import torch
from torch import nn

from services.compute.processor import has_kernels, has_matrix_units


def attend(qkv_TN3C: torch.Tensor, heads: int, scaling: float) -> torch.Tensor:
    """Attention inside each tile, no mask, no gradient in bf16. A tile's result does not depend on its batch;
    what it is computed from may, in the last bits, with a convolutional stem in fp32 (`vision_tower.ConvStem`).

    qkv_TN3C: queries, keys and values side by side, [T, N, 3 * C]. Returns [T, N, C].
    """
    tiles, tokens, width = qkv_TN3C.shape
    even = width // 3 // heads % 2 == 0
    bf16 = qkv_TN3C.dtype == torch.bfloat16
    if bf16 and even and not has_matrix_units() and has_kernels(torch.bfloat16):
        query_SHd, key_SHd, value_SHd = qkv_TN3C.view(tiles * tokens, 3, heads, -1).unbind(1)
        lens = [tokens] * tiles
        out_SHd = torch.ops.focusllava.packed_attention(
            query_SHd, key_SHd, value_SHd, lens, lens, scaling, causal=False
        )
        return out_SHd.view(tiles, tokens, width // 3)
    query_THNd, key_THNd, value_THNd = qkv_TN3C.view(tiles, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    out_THNd = nn.functional.scaled_dot_product_attention(query_THNd, key_THNd, value_THNd, scale=scaling)
    return out_THNd.transpose(1, 2).flatten(2)
