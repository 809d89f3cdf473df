"""What the model's methods return.

Legend: B sequences, C columns of a padded batch, S tokens of a packed row, K regions' branches, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from services.encoder.model import EncodedImage
from services.modeling.cache import ShrinkingCache
from services.modeling.packing import Lengths, Packed


@dataclass
class FocusLlavaOutput(ModelOutput):
    """What `forward` returns."""

    loss: torch.Tensor | None = None
    """float32 scalar, where there are labels."""
    logits: torch.Tensor | None = None
    """[B, C, V]: what follows each column, an image's read to its end; None where there are labels."""
    past_key_values: ShrinkingCache | None = None
    metrics: dict[str, float] | None = None
    """What `training_step` reports, where there are labels."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a micro-batch adds to the counts of its global batch."""

    answer_tokens: int
    branch_counts: torch.Tensor
    """int64 [K], CPU: regions that choose each branch; zeros with the vision-guided sampler off."""
    regions: int


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A packed row that has been through the decoder."""

    hidden_SD: torch.Tensor
    """What enters the final norm."""
    packed: Packed
    """The tokens that went through the last layer."""
    encoded: list[EncodedImage]
    """The visual tokens of each image."""
    entered: tuple[Lengths, ...]
    """Tokens of each sequence that entered the first layer."""
    visual: int
    """Visual tokens that entered it."""
    seen: list[list[int]]
    """Visual tokens that each conversation or branch saw, a list a decoder layer."""
