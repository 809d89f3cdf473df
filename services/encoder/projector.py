"""The projector: two linear layers from the vision tower's width to the LLM's, as in LLaVA."""

from __future__ import annotations

import torch
from torch import nn


class Projector(nn.Module):
    def __init__(self, vision_width: int, text_width: int, *, bias: bool = True):
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, text_width, bias=bias)
        self.linear_2 = nn.Linear(text_width, text_width, bias=bias)

    def forward(self, features_TPC: torch.Tensor) -> torch.Tensor:
        """[T, P, C] to [T, P, D]."""
        return self.linear_2(nn.functional.gelu(self.linear_1(features_TPC)))
