"""Packed attention over the paged KV cache, registered with transformers under the name "focusllava".

Legend: H query heads, G key heads, d head width, S tokens of a packed pass (several sequences end to end, no padding).
The decoder layers of transformers run as they are; the pass reaches the function below as the layers' keyword
argument `focus_step`, an `AttentionStep`. A faster kernel is one more class with the method `attend`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from services.llm.kv_cache import KVCache

ATTENTION_NAME = "focusllava"


class AttentionStep(Protocol):
    """One packed pass through layers of one KV cache group."""

    def attend(
        self, layer: int, query_HSd: torch.Tensor, key_GSd: torch.Tensor, value_GSd: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Stores K and V in the cache and returns the attention output [S, H, d]."""
        ...


def _store(cache: KVCache, slots_S: torch.Tensor, key_GSd: torch.Tensor, value_GSd: torch.Tensor) -> None:
    cache.key.flatten(0, 1).index_copy_(0, slots_S, key_GSd.transpose(0, 1))
    cache.value.flatten(0, 1).index_copy_(0, slots_S, value_GSd.transpose(0, 1))


class PrefillStep:
    """Whole prompts: each sequence attends causally to its own slice of the pass."""

    def __init__(self, cache: KVCache, group: int, request_ids: Sequence[str], lengths: Sequence[int]):
        self.cache = cache
        self.first_layer = cache.groups[group].first_layer
        self.lengths = list(lengths)
        self.slots_LS = torch.cat([cache.slots(r, group, n) for r, n in zip(request_ids, lengths, strict=True)], dim=1)

    def attend(
        self, layer: int, query_HSd: torch.Tensor, key_GSd: torch.Tensor, value_GSd: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        _store(self.cache, self.slots_LS[layer - self.first_layer], key_GSd, value_GSd)
        # Heads are repeated so that every SDPA backend takes its flash path; no S x S matrix is ever stored.
        repeats = query_HSd.shape[0] // key_GSd.shape[0]
        key_HSd, value_HSd = key_GSd.repeat_interleave(repeats, 0), value_GSd.repeat_interleave(repeats, 0)
        packed = [tensor.split(self.lengths, dim=1) for tensor in (query_HSd, key_HSd, value_HSd)]
        outputs = [
            F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scaling)[0]
            for q, k, v in zip(*packed, strict=True)
        ]
        return torch.cat(outputs, dim=1).transpose(0, 1)


class DecodeStep:
    """One new token of each of n sequences: K and V are gathered through the block tables into one padded batch."""

    def __init__(self, cache: KVCache, group: int, rows_LnB: torch.Tensor, lengths_n: torch.Tensor, longest: int):
        """rows_LnB: padded block tables of the group; lengths_n: tokens held before this pass, `longest` their max."""
        self.cache = cache
        self.first_layer = cache.groups[group].first_layer
        size = cache.block_size
        blocks = longest // size + 1
        self.rows_LnB = rows_LnB[:, :, :blocks]
        block_Ln1 = (lengths_n // size).expand(rows_LnB.shape[0], -1)[:, :, None]
        self.slots_Ln = rows_LnB.gather(2, block_Ln1).squeeze(2) * size + lengths_n % size
        position_S = torch.arange(blocks * size, device=lengths_n.device)
        self.mask_n11S = (position_S <= lengths_n[:, None])[:, None, None, :]

    def attend(
        self, layer: int, query_HSd: torch.Tensor, key_GSd: torch.Tensor, value_GSd: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        local = layer - self.first_layer
        _store(self.cache, self.slots_Ln[local], key_GSd, value_GSd)
        rows_nB = self.rows_LnB[local]
        key_nGSd, value_nGSd = (
            pool.index_select(0, rows_nB.flatten()).unflatten(0, rows_nB.shape).flatten(1, 2).transpose(1, 2)
            for pool in (self.cache.key, self.cache.value)
        )
        # The query heads of one key head take the place of query tokens, so K and V are not repeated.
        query_nGRd = query_HSd.transpose(0, 1).unflatten(1, (key_GSd.shape[0], -1))
        out_nGRd = F.scaled_dot_product_attention(
            query_nGRd, key_nGSd, value_nGSd, attn_mask=self.mask_n11S, scale=scaling
        )
        return out_nGRd.flatten(1, 2)


def decode_rows(cache: KVCache, group: int, request_ids: Sequence[str]) -> torch.Tensor:
    """int64 [layers of the group, n, most blocks]: the sequences' block tables, padded with the null row."""
    tables = [cache.rows(request_id, group) for request_id in request_ids]
    padded = tables[0].new_full((tables[0].shape[0], len(tables), max(t.shape[1] for t in tables)), cache.null_row)
    for index, table in enumerate(tables):
        padded[:, index, : table.shape[1]] = table
    return padded


def focus_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    focus_step: AttentionStep,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, H, S, d], key and value [1, G, S, d] -> ([1, S, H, d], None)."""
    assert attention_mask is None and query.shape[0] == 1
    layer: int = module.layer_idx  # type: ignore[assignment]
    return focus_step.attend(layer, query[0], key[0], value[0], scaling)[None], None


AttentionInterface.register(ATTENTION_NAME, focus_attention)
