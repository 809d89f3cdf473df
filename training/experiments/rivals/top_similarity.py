"""The paper's hand-made rival: keep the tokens most like the base tile.

FocusLLaVA: A Coarse-to-Fine Approach for Efficient and Effective Visual Token Compression, arXiv 2411.14228,
supplement, Tab. 7. Where it leaves a choice open, ours: the similarity is the inner product that its sampler uses (or
"cosine"), and ties go to the earlier token.

Legend: H, W feature map, D width, N base-tile tokens, K kept tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from services.common.errors import InvalidInput
from services.sampler.text_guided import keep_by_ratio
from training.experiments.rivals.base import ReducedMap, RivalInput, check_newline_rows, check_share, emit_kept


@dataclass(frozen=True, kw_only=True)
class TopSimilarity:
    budget: float = 0.25
    newline_rows: int = 1
    similarity: Literal["inner_product", "cosine"] = "inner_product"

    def __post_init__(self) -> None:
        check_share(self.budget)
        check_newline_rows(self.newline_rows)
        if self.similarity not in ("inner_product", "cosine"):
            raise InvalidInput(f"is {self.similarity!r}, expected inner_product or cosine", field="similarity")

    @torch.no_grad()
    def score(self, map_HWD: torch.Tensor, base_ND: torch.Tensor) -> torch.Tensor:
        """Each map token's similarity to the base tile's tokens, averaged over them; float32 [H * W]."""
        tokens_MD, base_ND = map_HWD.flatten(0, 1).float(), base_ND.float()
        if self.similarity == "cosine":
            tokens_MD, base_ND = nn.functional.normalize(tokens_MD, dim=-1), nn.functional.normalize(base_ND, dim=-1)
        # The average over the base tile moves inside the inner product.
        return tokens_MD @ base_ND.mean(0)

    def __call__(self, image: RivalInput) -> ReducedMap:
        kept_K = keep_by_ratio(self.score(image.map_HWD, image.base_ND), self.budget)
        return emit_kept(image, kept_K, self.newline_rows)
