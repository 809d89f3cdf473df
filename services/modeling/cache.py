"""The KV cache of `generate`: layers before the prune layer hold every token, the others those that went on.

Legend: B sequences, L columns of a layer, G key heads, d head width, T new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig

_attend = nn.functional.scaled_dot_product_attention


class ShrinkingCache(DynamicCache):
    """Keys and values [B, G, L, d] a layer, L another one from the prune layer on; columns of padding are masked.

    Positions go on from the sequences' whole lengths, whatever was pruned.
    """

    layers: list[Any]

    def __init__(self, config: PreTrainedConfig):
        """config: the decoder's."""
        super().__init__(config=config)
        self.seen = 0
        """Columns of `input_ids` that went in, images counted as one token: what `generate` counts by."""
        self.prune_layer = len(self.layers)
        self.position_B: torch.Tensor
        """int64: the position of each sequence's next token."""
        self._real_BL: list[torch.Tensor] = []
        """bool: the columns that are tokens, in the layers before the prune layer and from it on."""

    def begin(self, *, columns: int, lower: Sequence[int], upper: Sequence[int], prune_layer: int,
              device: torch.device) -> None:  # fmt: skip
        """Notes a prefill that is done. lower, upper: tokens of each sequence before the prune layer, and from it."""
        self.seen, self.prune_layer = columns, prune_layer
        self.position_B = torch.tensor(lower, device=device)
        self._real_BL = [
            torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
            for lengths in (list(lower), list(upper))
        ]

    def put(self, layer: int, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        """Takes a layer's prefill: [1, G, s, d], one entry a sequence."""
        self.layers[layer].update(*(_padded(parts) for parts in (keys, values)))

    def grow(self, tokens: int) -> torch.Tensor:
        """Makes room for so many new tokens of every sequence; returns their positions, int64 [B, T]."""
        position_BT = self.position_B[:, None] + torch.arange(tokens, device=self.position_B.device)
        self.seen, self.position_B = self.seen + tokens, self.position_B + tokens
        self._real_BL = [torch.cat((real, real.new_ones(len(real), tokens)), dim=1) for real in self._real_BL]
        return position_BT

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scaling: float) -> torch.Tensor:  # fmt: skip
        """Attention of new tokens, [B, H, T, d], to all that went on in this layer; returns [B, T, H, d]."""
        key, value = self.layers[layer].update(key, value)
        real_BL, tokens = self._real_BL[layer >= self.prune_layer], query.shape[2]
        mask = real_BL[:, None, None, :]
        if tokens > 1:
            causal = torch.ones(tokens, real_BL.shape[1], dtype=torch.bool, device=query.device)
            mask = mask & causal.tril(real_BL.shape[1] - tokens)
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        return _attend(query, key, value, attn_mask=mask, scale=scaling).transpose(1, 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    @property
    def is_croppable(self) -> bool:
        return False

    def crop(self, *_: Any) -> None:
        raise NotImplementedError("a cache that was pruned cannot be cropped: decode without an assistant")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        for layer in self.layers:
            layer.keys, layer.values = (x.index_select(0, beam_idx.to(x.device)) for x in (layer.keys, layer.values))
        self._real_BL = [real.index_select(0, beam_idx.to(real.device)) for real in self._real_BL]
        self.position_B = self.position_B.index_select(0, beam_idx.to(self.position_B.device))


def _padded(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """[1, G, s, d] tensors as [B, G, L, d], zeros at the right."""
    longest = max(part.shape[2] for part in parts)
    return torch.cat([nn.functional.pad(part, (0, 0, 0, longest - part.shape[2])) for part in parts])
