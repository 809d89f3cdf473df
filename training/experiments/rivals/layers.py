"""Rivals of the text-guided sampler: they drop visual tokens inside the LLM, at one layer or several.

A stage (layer, share) acts on the hidden states that enter `layer` (zero-based): with that layer's own norm, q/k
projections and rotary embedding, as the text-guided sampler does, it scores the visual tokens that are still there,
and keeps so many that `share` of all the image's visual tokens is left (base tile and newlines are visual tokens like
any other). Kept tokens keep their order and their positions. Only the asking tokens' scores against visual keys are
computed.

Legend: S tokens of a packed row, T asking tokens, N visual tokens still there, H/G query/key heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch

from services.common.errors import InvalidInput
from services.modeling.loss import IGNORED
from services.modeling.packing import Packed
from services.sampler.text_guided import kept_by_ratio

Asks = Literal["last_prompt_token", "last_instruction_token"]
"""The token before the answer, the chat template's own; or the last of the user's words."""
Stages = tuple[tuple[int, float], ...]
"""(layer, share of the image's visual tokens that goes on), in order."""


class LayerRival(Protocol):
    """When tokens leave, who is asked, and what a token is worth."""

    @property
    def stages(self) -> Stages: ...

    @property
    def asks(self) -> Asks: ...

    def importance(self, query_THd: torch.Tensor, key_NGd: torch.Tensor, scaling: float) -> torch.Tensor:
        """float32 [N]; both inputs carry their rotary embedding."""


def mean_attention(query_THd: torch.Tensor, key_NGd: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention to each visual token, averaged over heads and asking tokens; softmax over visual tokens in float32.

    FastV's and PyramidDrop's own softmax runs over the whole sequence, so that a head counts by how much of it looks
    at the image; here all heads count alike.
    """
    heads, groups = query_THd.shape[1], key_NGd.shape[1]
    query_GRTd = query_THd.float().permute(1, 0, 2).unflatten(0, (groups, heads // groups))
    key_G1dN = key_NGd.float().permute(1, 2, 0).unsqueeze(1)
    return (query_GRTd @ key_G1dN * scaling).softmax(dim=-1).mean((0, 1, 2))


def asking_tokens(asks: Asks, packed: Packed) -> torch.Tensor:
    """bool [S]: at most one token a branch, none in a branch without an answer, or without an instruction."""
    if asks == "last_prompt_token":
        return (packed.label_S == IGNORED) & (packed.target_S() != IGNORED)
    asking_S = torch.zeros_like(packed.instruction_S)
    for rows in packed.rows():
        asking_S[rows[packed.instruction_S[rows]][-1:]] = True
    return asking_S


def keep_stage(importance_N: torch.Tensor, share: float, total: int) -> torch.Tensor:
    """The ceil(share * total) most important of the tokens still there; ties go to the earlier one.

    `total` is the image's visual tokens before the first stage. Returns ascending int64 indices into [N].
    """
    kept = kept_by_ratio(total, share)
    return importance_N.argsort(descending=True, stable=True)[:kept].sort().values


def converted_share(stages: Stages, layers: int) -> float:
    """Visual tokens averaged over the LLM's layers, as a share of those that entered (Sec. 4.4)."""
    starts, shares = [0, *(layer for layer, _ in stages)], [1.0, *(share for _, share in stages)]
    ends = [*starts[1:], layers]
    return sum((end - start) * share for start, end, share in zip(starts, ends, shares, strict=True)) / layers


def check_layers(stage_layers: Sequence[int], layers: int) -> None:
    """Raises InvalidInput unless every stage lies inside the LLM and they ascend."""
    if not stage_layers or any(b <= a for a, b in zip((0, *stage_layers), (*stage_layers, layers), strict=True)):
        raise InvalidInput(f"is {tuple(stage_layers)}, expected ascending layers in 1..{layers - 1}", field="layers")


def check_asks(asks: str) -> None:
    if asks not in ("last_prompt_token", "last_instruction_token"):
        raise InvalidInput(f"is {asks!r}, expected last_prompt_token or last_instruction_token", field="asks")
