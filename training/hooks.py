"""The places of the joint model where an experiment may stand. The paper's own training leaves all of them empty.

`training.experiments` fills them; nothing here knows what with.

Legend: B images, R rows (an image's branch each), S sequence, D LLM width, d head width, Q branches, T branch length.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from services.common.types import ImageTiles
from services.encoder.model import EncodedImage, EncoderModel
from services.sampler.vision_guided import Choice
from training.layout import Boxes, Sample, TextBatch


class MapHook(Protocol):
    """Stands in the vision-guided sampler's place."""

    def __call__(self, encoder: EncoderModel, images: Sequence[ImageTiles]) -> list[EncodedImage]:
        """The encoder's forward pass with another way to reduce the feature map."""


class BranchHook(Protocol):
    """Chooses the branches instead of the selector."""

    @property
    def selects(self) -> bool:
        """Whether the selector is still asked, and so trained by the balance loss."""

    def choice(self, rng: random.Random, map_hw: tuple[int, int], window: int, glyph_boxes: Boxes) -> Choice:
        """One image's choice. What is drawn depends on `rng` alone; boxes are fractions of width and height."""


class LayerHook(Protocol):
    """Drops visual tokens between two layers, in the text-guided sampler's place."""

    @property
    def stages(self) -> tuple[tuple[int, float], ...]:
        """(layer, share of the image's visual tokens that goes on), in order."""

    def keep(self, share: float, layer: nn.Module, hidden_RSD: torch.Tensor, cos_RSd: torch.Tensor,
             sin_RSd: torch.Tensor, text: TextBatch, before: int, present_R: list[int],
             totals_R: list[int]) -> list[torch.Tensor]:  # fmt: skip
        """One stage: kept visual tokens of each row, ascending indices from its first one.

        A row holds `before` words, its `present_R` visual tokens, its branch, padding; it had `totals_R` visual
        tokens before the first stage.
        """


class AttentionLossHook(Protocol):
    """A loss on what attention looks at. It needs all visual tokens."""

    @property
    def weight(self) -> float: ...

    @property
    def taught_layers(self) -> set[int]:
        """Layers whose attention has a loss."""

    def evidence(self, samples: Sequence[Sample], encoded: Sequence[EncodedImage]) -> Any:
        """Whatever `losses` needs to know of the batch."""

    def losses(self, index: int, layer: nn.Module, hidden_BSD: torch.Tensor, cos_BSd: torch.Tensor,
               sin_BSd: torch.Tensor, mask_B1RS: torch.Tensor, text: TextBatch, prefix: int,
               evidence: Any) -> list[torch.Tensor]:  # fmt: skip
        """Losses of a taught layer, float32 scalars. `hidden` is what enters it; branches start at `prefix`."""
