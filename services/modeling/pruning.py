"""Text-guided pruning of a packed row: once a sequence, by all its instruction's words (method, section 2).

Legend: S tokens of a packed row, D width, d head width, N visual tokens, T instruction tokens, H/G query/key heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from services.common.settings import require
from services.common.types import SamplerSettings
from services.modeling.packing import Packed
from services.sampler.text_guided import apply_rotary, keep, keeps_all, text_importance

SCORED_QUERIES = 256
"""Most instruction tokens scored at once, so that a long conversation's scores do not all exist together."""


@dataclass(frozen=True, kw_only=True)
class PruneDraw:
    """Where a micro-batch's visual tokens are pruned, and how far: one draw of training."""

    layer: int
    """i: the layer before which they leave, 1 or later. Under ZeRO-3 it must be the same on every rank."""
    thresholds: tuple[float, ...]
    """gamma of each sequence."""

    def __post_init__(self) -> None:
        require(self.layer > 0, "layer", self.layer, "1 or more")
        require(all(0 < each <= 1 for each in self.thresholds), "thresholds", self.thresholds, "each in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A prune layer, and how each sequence chooses there."""

    layer: int
    settings: tuple[SamplerSettings, ...]
    """A threshold or a keep ratio is set in each."""

    @classmethod
    def of(cls, draw: PruneDraw) -> Cut:
        return cls(layer=draw.layer, settings=tuple(SamplerSettings(threshold=each) for each in draw.thresholds))


@torch.no_grad()
def stays(layer: Any, hidden_SD: torch.Tensor, cos_Sd: torch.Tensor, sin_Sd: torch.Tensor, packed: Packed,
          settings: Sequence[SamplerSettings]) -> torch.Tensor:  # fmt: skip
    """bool [S]: the tokens that go on into `layer`, by the served model's rule.

    A sequence without images or without an instruction keeps all. layer: a decoder layer of transformers, whose norm,
    projections and rotary embedding are used; hidden_SD: what enters it.
    """
    require(len(settings) == len(packed.lengths), "thresholds", len(settings), f"{len(packed.lengths)}, one a sequence")
    attention = layer.self_attn

    def project(projection: Any, index: torch.Tensor) -> torch.Tensor:
        # A row where there is none: under ZeRO-3 every rank has to call what another one calls.
        index = index if len(index) else torch.zeros(1, dtype=torch.int64, device=index.device)
        x_SHd = projection(layer.input_layernorm(hidden_SD[index])).unflatten(-1, (-1, attention.head_dim))
        return apply_rotary(x_SHd, cos_Sd[index], sin_Sd[index])

    instruction, visual = packed.instruction_S.nonzero()[:, 0], packed.visual_S.nonzero()[:, 0]
    query_THd, key_NGd = project(attention.q_proj, instruction), project(attention.k_proj, visual)
    staying_S, lengths = torch.ones_like(packed.visual_S), list(packed.lengths)
    asked, seen, start_T, start_N = packed.instruction_S.split(lengths), packed.visual_S.split(lengths), 0, 0
    for asks_S, sees_S, setting in zip(asked, seen, settings, strict=True):
        own_T, own_N = (slice(start_T, start_T + int(asks_S.sum())), slice(start_N, start_N + int(sees_S.sum())))
        start_T, start_N = own_T.stop, own_N.stop
        if own_T.start == own_T.stop or own_N.start == own_N.stop or keeps_all(setting):
            continue
        importance_N = mean_importance(query_THd[own_T], key_NGd[own_N], attention.scaling)
        visual_N = visual[own_N]
        staying_S[visual_N] = False
        staying_S[visual_N[keep(importance_N, setting)]] = True
    return staying_S


def mean_importance(query_THd: torch.Tensor, key_NGd: torch.Tensor, scaling: float) -> torch.Tensor:
    """`text_importance`, some instruction tokens at a time: float32 [N]."""
    importance_N = torch.zeros(len(key_NGd), device=key_NGd.device)
    for part_THd in query_THd.split(SCORED_QUERIES):
        importance_N += text_importance(part_THd, key_NGd, scaling) * (len(part_THd) / len(query_THd))
    return importance_N
