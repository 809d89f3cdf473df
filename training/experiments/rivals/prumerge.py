"""PruMerge+: as many tokens as stand out in the tower's attention, an even sample beside them, the rest merged in.

LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models, ICCV 2025, arXiv 2403.15388.

Outliers are the patches whose CLS attention exceeds the third quartile by more than 1.5 interquartile ranges. Beside
them every (map // outliers // 3)-th token is kept. Each kept token takes in the dropped tokens whose keys are most
like its own, weighted by their attention.

`budget=None` is the paper's: the image decides how many. With a budget the outliers come first, the strongest if
there are too many, and an even sample of the others fills it, so that comparisons are at equal counts.

Where we differ, and why:
- After the projector and over the whole unpadded map; the paper works before it, on single images of one tile.
- Neighbours are 32 of 576 tokens as a share of the map, and weights are shares of the map's attention, so that the
  strength of merging does not depend on the image's size; on a map of 24 x 24 both are the paper's.
- The authors' code adds the weighted neighbours to the token; ours divides by the sum of weights (the token's own is
  1), for a projected token has the scale of a word embedding. Neighbours are dropped tokens only, as the paper's text
  has it.
- The authors' code appends one token more, the mean of the dropped; it has no place on the map, and ours leaves it out.

Legend: H, W feature map, D width, G heads, d head width, M map tokens, K kept tokens, R dropped, n neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from services.sampler.text_guided import kept_by_ratio
from training.experiments.rivals.base import (
    ReducedMap,
    RivalInput,
    check_newline_rows,
    check_share,
    emit,
    needed,
    others,
    outliers,
    spread,
)
from training.experiments.rivals.tower import Source, check_source


@dataclass(frozen=True, kw_only=True)
class PruMergePlus:
    budget: float | None = 0.25
    newline_rows: int = 1
    neighbour_share: float = 32 / 576
    """Share of the map's tokens: how many dropped ones each kept one takes in."""
    source: Source = "cls"
    """The tokens whose attention in the tower `RivalInput.attention_HW` has to be."""

    def __post_init__(self) -> None:
        check_share(self.budget)
        check_share(self.neighbour_share, "neighbour_share")
        check_newline_rows(self.newline_rows)
        check_source(self.source)

    def __call__(self, image: RivalInput) -> ReducedMap:
        tokens_MD = image.map_HWD.flatten(0, 1)
        attention_M = needed(image.attention_HW, "attention_HW", "prumerge_plus").flatten().float()
        key_MC = needed(image.key_HWGd, "key_HWGd", "prumerge_plus").flatten(0, 1).flatten(1).float()
        kept_K = self.select(attention_M)
        dropped_R = others(kept_K, len(tokens_MD))
        neighbours = min(kept_by_ratio(len(tokens_MD), self.neighbour_share), len(dropped_R))
        cells_KD = tokens_MD[kept_K]
        if neighbours:
            with torch.no_grad():
                key_MC = nn.functional.normalize(key_MC, dim=-1)
                likeness_KR = key_MC[kept_K] @ key_MC[dropped_R].T
                near_Kn = likeness_KR.sort(dim=1, descending=True, stable=True).indices[:, :neighbours]
                weight_R = (attention_M / attention_M.sum())[dropped_R]
                weight_KR = torch.zeros_like(likeness_KR).scatter(1, near_Kn, weight_R[near_Kn])
            taken_KD = cells_KD.float() + weight_KR @ tokens_MD[dropped_R].float()
            cells_KD = (taken_KD / (1 + weight_KR.sum(1, keepdim=True))).to(tokens_MD.dtype)
        return emit(cells_KD, kept_K, image, self.newline_rows)

    @torch.no_grad()
    def select(self, attention_M: torch.Tensor) -> torch.Tensor:
        """Ascending indices of the kept tokens, int64 [K]."""
        count = len(attention_M)
        # Attention with no outlier (a blank image) still has a strongest token.
        standing_out = max(outliers(attention_M), 1)
        order_M = attention_M.argsort(descending=True, stable=True)
        if self.budget is None:
            step = max(count // standing_out // 3, 1)
            return torch.cat((order_M[:standing_out], torch.arange(0, count, step, device=order_M.device))).unique()
        total = kept_by_ratio(count, self.budget)
        strongest = order_M[: min(standing_out, total)]
        rest = others(strongest, count)
        return torch.cat((strongest, spread(rest, total - len(strongest)))).sort().values
