"""Text-guided pruning of a packed row: once a branch, by all its instruction's words (method, section 2).

Legend: S tokens of a packed row, D width, d head width, N visual tokens, A asking tokens, H/G query/key heads.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from services.common.settings import require
from services.common.types import SamplerSettings
from services.modeling.packing import Packed
from services.sampler.text_guided import apply_rotary, keep, keeps_all, text_importance

SCORED_QUERIES = 256
"""Most instruction tokens scored at once, so that a long conversation's scores do not all exist together."""


class Cut(Protocol):
    """A rule by which visual tokens leave between two decoder layers, each branch's own."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers before which they leave, ascending."""

    def asking(self, packed: Packed) -> torch.Tensor:
        """bool [S]: the tokens whose queries choose. A branch that has none keeps all."""

    def keep(self, layer: int, branch: int, entered: int, query_AHd: torch.Tensor, key_NGd: torch.Tensor,
             scaling: float) -> torch.Tensor:  # fmt: skip
        """Ascending int64 indices into [N], the visual tokens of a branch that are still there.

        entered: how many it had at the first layer. Queries and keys carry their rotary embedding.
        """


@dataclass(frozen=True, kw_only=True)
class PruneDraw:
    """The text-guided sampler in one pass: where visual tokens leave, and how many. A `Cut`."""

    layer: int
    """i: the layer before which they leave, 1 or later. Under ZeRO-3 it must be the same on every rank."""
    thresholds: tuple[float, ...]
    """gamma of each conversation or branch."""
    keep_ratio: float | None = None
    """A fixed share of each branch's visual tokens in place of the thresholds."""

    def __post_init__(self) -> None:
        require(self.layer > 0, "layer", self.layer, "1 or more")
        require(all(0 < each <= 1 for each in self.thresholds), "thresholds", self.thresholds, "each in (0, 1]")
        ratio = self.keep_ratio
        require(ratio is None or 0 < ratio <= 1, "keep_ratio", ratio, "in (0, 1]")

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    def asking(self, packed: Packed) -> torch.Tensor:
        right, expected = len(self.thresholds) == packed.branches, f"{packed.branches}, one a conversation or branch"
        require(right, "thresholds", len(self.thresholds), expected)
        return packed.instruction_S

    def keep(self, layer: int, branch: int, entered: int, query_AHd: torch.Tensor, key_NGd: torch.Tensor,
             scaling: float) -> torch.Tensor:  # fmt: skip
        threshold = self.thresholds[branch] if self.keep_ratio is None else None
        setting = SamplerSettings(threshold=threshold, keep_ratio=self.keep_ratio)
        if keeps_all(setting):
            return torch.arange(len(key_NGd), device=key_NGd.device)
        return keep(mean_importance(query_AHd, key_NGd, scaling), setting)


@dataclass(frozen=True, kw_only=True)
class PruneSchedule:
    """How the layer i and the threshold gamma of a step are drawn. Equal ends make them fixed ("Train" of Tab. 6)."""

    layers: tuple[int, int] = (8, 24)
    """First and last layer of the uniform draw, both included; one draw a pass, all of whose rows leave together."""
    thresholds: tuple[float, float] = (0.7, 1.0)
    """Ends of the uniform draw, one draw an image-text pair."""

    def __post_init__(self) -> None:
        (first, last), (low, high) = self.layers, self.thresholds
        require(1 <= first <= last, "layers", self.layers, "an ascending pair from 1 on")
        require(0 < low <= high <= 1, "thresholds", self.thresholds, "an ascending pair in (0, 1]")

    def draw_layer(self, rng: random.Random) -> int:
        return rng.randint(*self.layers)

    def draw_threshold(self, rng: random.Random) -> float:
        return rng.uniform(*self.thresholds)

    def draw(self, rng: random.Random, pairs: int) -> PruneDraw:
        """A pass of so many conversations or branches."""
        layer = self.draw_layer(rng)
        return PruneDraw(layer=layer, thresholds=tuple(self.draw_threshold(rng) for _ in range(pairs)))


@torch.no_grad()
def kept_rows(index: int, layer: Any, hidden_SD: torch.Tensor, cos_Sd: torch.Tensor, sin_Sd: torch.Tensor,
              packed: Packed, cut: Cut, entered: list[int]) -> list[torch.Tensor]:  # fmt: skip
    """For each branch the places in the row, int64, of what it goes on with into a layer.

    layer: a decoder layer of transformers, number `index`, whose norm, projections and rotary embedding are used;
    hidden_SD: what enters it; entered: visual tokens of each branch at the first layer.
    """
    attention = layer.self_attn

    def project(projection: Any, index: torch.Tensor) -> torch.Tensor:
        # A row where there is none: under ZeRO-3 every rank has to call what another one calls.
        index = index if len(index) else torch.zeros(1, dtype=torch.int64, device=index.device)
        x_SHd = projection(layer.input_layernorm(hidden_SD[index])).unflatten(-1, (-1, attention.head_dim))
        return apply_rotary(x_SHd, cos_Sd[index], sin_Sd[index])

    asks_S, visual_S = cut.asking(packed), packed.visual_S
    query_AHd = project(attention.q_proj, asks_S.nonzero()[:, 0])
    key_NGd = project(attention.k_proj, visual_S.nonzero()[:, 0])
    query_of_S, key_of_S = asks_S.cumsum(0) - 1, visual_S.cumsum(0) - 1
    going = []
    for branch, rows in enumerate(packed.rows()):
        asking, visual = rows[asks_S[rows]], rows[visual_S[rows]]
        if len(asking) and len(visual):
            queries, keys = query_AHd[query_of_S[asking]], key_NGd[key_of_S[visual]]
            kept = cut.keep(index, branch, entered[branch], queries, keys, attention.scaling)
            goes_S = ~visual_S
            goes_S[visual[kept]] = True
            rows = rows[goes_S[rows]]
        going.append(rows)
    return going


def mean_importance(query_AHd: torch.Tensor, key_NGd: torch.Tensor, scaling: float) -> torch.Tensor:
    """`text_importance`, some instruction tokens at a time: float32 [N]."""
    importance_N = torch.zeros(len(key_NGd), device=key_NGd.device)
    for part_AHd in query_AHd.split(SCORED_QUERIES):
        importance_N += text_importance(part_AHd, key_NGd, scaling) * (len(part_AHd) / len(query_AHd))
    return importance_N
