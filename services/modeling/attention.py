"""Causal attention inside each of several sequences that stand in one packed row.

Registered with transformers, so that its decoder layers run as they are. Conversations never have a mask: on a GPU in
half precision it is one call of flash attention for all, elsewhere one call of torch's fused attention for each. Where
branches share a prefix (generated data), each sequence is a causal call for the prefix and one with a mask for
its branches' rows.

Legend: S tokens of a packed row, R those in a sequence's branches, B sequences, T new tokens of each, L tokens that a
row may see, H/G query/key heads, d head width.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface

from services.modeling.packing import Lengths

ATTENTION_NAME = "focusllava_packed"
_attend = nn.functional.scaled_dot_product_attention


class Rows(Protocol):
    """How the rows of one pass see each other."""

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scaling: float) -> torch.Tensor:  # fmt: skip
        """[b, H, s, d] queries, [b, G, s, d] keys and values of one layer's rows; returns [b, s, H, d]."""


class KeptKeys(Protocol):
    """A cache that takes the keys and values of a packed row."""

    def put(self, layer: int, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        """Keys and values, each [1, G, s, d], one entry a sequence."""


class PackedRows:
    """Sequences one after the other in one row: b is 1, s the tokens of all."""

    def __init__(self, lengths: Sequence[Lengths], cache: KeptKeys | None = None):
        """lengths: tokens of each sequence; cache: takes all keys and values."""
        self.lengths, self.cache = list(lengths), cache
        self._sizes = [each.whole for each in lengths]
        self._shared = any(each.prefix for each in lengths)
        self._starts: torch.Tensor | None = None
        self._masks: dict[int, torch.Tensor] = {}

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               scaling: float) -> torch.Tensor:  # fmt: skip
        if self.cache is not None:
            self.cache.put(layer, key.split(self._sizes, dim=2), value.split(self._sizes, dim=2))
        if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not self._shared:  # GPU only
            query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
            return flash_attention()(query, key, value, self._starts_on(query.device), max(self._sizes), scaling)[None]
        repeats = query.shape[1] // key.shape[1]
        parts = (x.split(self._sizes, dim=2) for x in (query, _repeat(key, repeats), _repeat(value, repeats)))
        attended = []
        for number, (q, k, v) in enumerate(zip(*parts, strict=True)):
            if prefix := self.lengths[number].prefix:
                first_q, first_k, first_v = (x[:, :, :prefix] for x in (q, k, v))
                attended.append(_attend(first_q, first_k, first_v, is_causal=True, scale=scaling))
                attended.append(_attend(q[:, :, prefix:], k, v, attn_mask=self.mask(number, q.device), scale=scaling))
            else:
                attended.append(_attend(q, k, v, is_causal=True, scale=scaling))
        return torch.cat(attended, dim=2).transpose(1, 2)

    def mask(self, number: int, device: torch.device) -> torch.Tensor:
        """bool [R, L]: what the rows of a sequence's branches see, the prefix and, causally, their own branch."""
        if number not in self._masks:
            prefix, branches = self.lengths[number]
            own = torch.block_diag(*(torch.ones(n, n, dtype=torch.bool, device=device).tril() for n in branches))
            self._masks[number] = nn.functional.pad(own, (prefix, 0), value=True)
        return self._masks[number]

    def _starts_on(self, device: torch.device) -> torch.Tensor:
        if self._starts is None:
            starts = list(itertools.accumulate(self._sizes, initial=0))
            self._starts = torch.tensor(starts, dtype=torch.int32, device=device)
        return self._starts


def _repeat(x: torch.Tensor, repeats: int) -> torch.Tensor:
    # Left to torch (enable_gqa), a CPU would take the way that makes S x S scores.
    return x if repeats == 1 else x.repeat_interleave(repeats, dim=1)


Varlen = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, float], torch.Tensor]
"""Causal flash attention of packed sequences: queries, keys and values [S, heads, d], starts, longest, scaling."""


@functools.cache
def flash_attention() -> Varlen:
    """torch's own flash attention for sequences of different lengths; the flash-attn package's where torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

        def packaged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int,
                     scaling: float) -> torch.Tensor:  # fmt: skip
            return flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, softmax_scale=scaling, causal=True)

        return packaged

    def native(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int,
               scaling: float) -> torch.Tensor:  # fmt: skip
        out: Any = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scaling, window_size=(-1, 0),
                               enable_gqa=True)  # fmt: skip
        return out

    return native


def packed_attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                     attention_mask: torch.Tensor | None, *, scaling: float, focus_rows: Rows,
                     **_: Any) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' attention interface: [b, H, s, d] queries -> [b, s, H, d], as `focus_rows` says."""
    return focus_rows.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(ATTENTION_NAME, packed_attention)
