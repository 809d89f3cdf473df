"""VisionZip: the patches that the vision tower attends to, and the rest merged into a few.

VisionZip: Longer is Better but Not Necessary in Vision Language Models, CVPR 2025, arXiv 2412.04467.

Dominant tokens are those that receive most attention in the tower; of the others an even spread are targets, and each
of the rest joins the target whose key is most like its own. Contextual tokens are 10 of 64, as the paper splits its
smallest budget.

Where we differ, and why:
- The paper picks and merges before the projector, tile by tile with one budget each; ours after it, over the whole
  unpadded map, where the vision-guided sampler works and where a padded tile costs nothing.
- The authors' code adds the mean of the tokens that joined to the target. A projected token has the scale of a word
  embedding, so ours is the mean of all of them, the target included.
- It keeps the CLS token as well; our encoder projects none.
- It puts contextual tokens last; ours stand where their target was, so that rows and newlines still mean something.
- Its targets are every (rest // contextual)-th token, which crowd at the top unless that divides; ours spread evenly.

Legend: H, W feature map, D width, G heads, d head width, K dominant tokens, R the rest, C contextual tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from services.common.errors import InvalidInput
from services.sampler.text_guided import kept_by_ratio
from training.experiments.rivals.base import (
    ReducedMap,
    RivalInput,
    check_newline_rows,
    check_share,
    emit,
    needed,
    others,
    spread,
)
from training.experiments.rivals.tower import Source, check_source


@dataclass(frozen=True, kw_only=True)
class VisionZip:
    budget: float = 0.25
    newline_rows: int = 1
    contextual_share: float = 10 / 64
    """Share of the tokens that come out."""
    source: Source = "cls"
    """The tokens whose attention in the tower `RivalInput.attention_HW` has to be."""

    def __post_init__(self) -> None:
        check_share(self.budget)
        check_newline_rows(self.newline_rows)
        check_source(self.source)
        if not 0 <= self.contextual_share < 1:
            raise InvalidInput(f"is {self.contextual_share}, expected [0, 1)", field="contextual_share")

    def __call__(self, image: RivalInput) -> ReducedMap:
        tokens_MD = image.map_HWD.flatten(0, 1)
        total = kept_by_ratio(len(tokens_MD), self.budget)
        contextual = int(total * self.contextual_share + 0.5)
        attention_M = needed(image.attention_HW, "attention_HW", "visionzip").flatten().float()
        key_MGd = needed(image.key_HWGd, "key_HWGd", "visionzip").flatten(0, 1)
        dominant_K = attention_M.argsort(descending=True, stable=True)[: total - contextual].sort().values
        rest_R = others(dominant_K, len(tokens_MD))
        target_C = spread(rest_R, contextual)
        share_CR = self._shares(key_MGd, rest_R, target_C)
        merged_CD = (share_CR @ tokens_MD[rest_R].float()).to(tokens_MD.dtype)
        source_K, order_K = torch.cat((dominant_K, target_C)).sort()
        return emit(torch.cat((tokens_MD[dominant_K], merged_CD))[order_K], source_K, image, self.newline_rows)

    @torch.no_grad()
    def _shares(self, key_MGd: torch.Tensor, rest_R: torch.Tensor, target_C: torch.Tensor) -> torch.Tensor:
        """Row c: the weight of each of the rest in contextual token c; float32 [C, R], rows sum to 1."""
        key_Md = nn.functional.normalize(key_MGd.float().mean(1), dim=-1)
        likeness_RC = key_Md[rest_R] @ key_Md[target_C].T
        if not len(target_C):
            return likeness_RC.T
        # A stable sort: argmax says nothing of which of two equals it takes.
        joins_R = likeness_RC.sort(dim=1, descending=True, stable=True).indices[:, 0]
        index_C = torch.arange(len(target_C), device=rest_R.device)
        joins_R = joins_R.masked_scatter(torch.isin(rest_R, target_C), index_C)
        member_CR = (joins_R == index_C.unsqueeze(1)).float()
        return member_CR / member_CR.sum(1, keepdim=True)
