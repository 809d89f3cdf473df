"""TRIM: the patches most like the question, by CLIP's own measure, and one token for the rest.

Less is More: A Simple yet Effective Token Reduction Method for Efficient Multi-modal LLMs, COLING 2025, arXiv
2409.10994.

Patches are ranked by cosine similarity to the question's pooled text embedding; those that stand out after a softmax
(quartiles, as in PruMerge) are kept, and the mean of all others is appended as one token. `budget=None` is the
paper's; with a budget as many are kept as leave room for the appended one.

It needs patch and text embeddings in one space, that is a vision tower trained with a text tower, and both
projections. A FocusLLaVA or LLaVA checkpoint holds no text tower, and a tower trained from nothing has none: `text_E`
and `aligned_HWE` are then missing, and InvalidInput says so. It also reads the question, so that an image has one map
a question.

Where we differ: over the whole unpadded map, after the projector, and the appended token follows the last kept one,
inside its row. The paper keeps the most similar patches, and so do we; the authors' code ranks by the negated
similarity, which for a CLIP whose patches are least like their own text may be what works: give `aligned_HWE` negated
to try it.

Legend: H, W feature map, D width, E width of the shared space, M map tokens, K kept tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from services.sampler.rivals.base import (
    ReducedMap,
    RivalInput,
    check_newline_rows,
    check_share,
    emit,
    needed,
    others,
    outliers,
)
from services.sampler.text_guided import kept_by_ratio


@dataclass(frozen=True, kw_only=True)
class Trim:
    budget: float | None = 0.25
    newline_rows: int = 1

    def __post_init__(self) -> None:
        check_share(self.budget)
        check_newline_rows(self.newline_rows)

    def __call__(self, image: RivalInput) -> ReducedMap:
        tokens_MD = image.map_HWD.flatten(0, 1)
        kept_K = self._select(image)
        rest_R = others(kept_K, len(tokens_MD))
        cells_KD, source_K = tokens_MD[kept_K], kept_K
        # A budget of a single token has no room for a second.
        if len(rest_R) and (self.budget is None or kept_by_ratio(len(tokens_MD), self.budget) > 1):
            mean_1D = tokens_MD[rest_R].float().mean(0, keepdim=True).to(tokens_MD.dtype)
            cells_KD, source_K = torch.cat((cells_KD, mean_1D)), torch.cat((kept_K, kept_K[-1:]))
        return emit(cells_KD, source_K, image, self.newline_rows)

    @torch.no_grad()
    def _select(self, image: RivalInput) -> torch.Tensor:
        text_E = needed(image.text_E, "text_E", "trim (a text embedding in the space of the patch embeddings)")
        aligned = needed(image.aligned_HWE, "aligned_HWE", "trim (patch embeddings in the space of the text embedding)")
        score_M = nn.functional.cosine_similarity(aligned.flatten(0, 1).float(), text_E.float().unsqueeze(0), dim=-1)
        count = len(score_M)
        if self.budget is None:
            kept = max(outliers(score_M.softmax(0)), 1)
        else:
            total = kept_by_ratio(count, self.budget)
            kept = total if total == count else max(total - 1, 1)
        return score_M.argsort(descending=True, stable=True)[:kept].sort().values
