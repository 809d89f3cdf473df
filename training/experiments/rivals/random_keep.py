"""Random tokens: the control that a selector has to beat, and that many published ones do not.

For such a comparison see Token Pruning in Multimodal Large Language Models: Are We Solving the Right Problem?
(Findings of ACL 2025, arXiv 2502.11501).

A token is drawn by the image's own name and a seed, never by the features: these change as training goes on and
differ by device, and one pattern for all images could be learned.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from services.sampler.text_guided import kept_by_ratio
from training.experiments.rivals.base import ReducedMap, RivalInput, check_newline_rows, check_share, emit_kept, needed


@dataclass(frozen=True, kw_only=True)
class RandomKeep:
    budget: float = 0.25
    newline_rows: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_share(self.budget)
        check_newline_rows(self.newline_rows)

    def __call__(self, image: RivalInput) -> ReducedMap:
        name = needed(image.content_hash, "content_hash", "random")
        height, width, _ = image.map_HWD.shape
        digest = hashlib.sha256(f"{self.seed}/{height}x{width}/{name}".encode()).digest()
        # On the CPU, so that every device keeps the same tokens.
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
        kept = kept_by_ratio(height * width, self.budget)
        kept_K = torch.randperm(height * width, generator=generator)[:kept].sort().values
        return emit_kept(image, kept_K.to(image.map_HWD.device), self.newline_rows)
