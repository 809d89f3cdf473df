"""One conversation as it is trained: one causal sequence, its images where the turns have them.

Legend: S tokens of the sequence, an image counted as one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from services.common.types import ImageTiles

IGNORED = -100
"""The label of a token that is in no loss."""


@dataclass(frozen=True, kw_only=True)
class TrainingSequence:
    """A conversation's tokens. An image is one image token, which the model replaces by the image's visual tokens."""

    input_ids: torch.Tensor
    """int64 [S]."""
    labels: torch.Tensor
    """int64 [S]: the token itself where it belongs to an answer, else -100; image tokens and user words never do."""
    instruction: torch.Tensor
    """bool [S]: whether the token is one of the user's own words, in any turn; the text-guided sampler reads these."""
    images: tuple[ImageTiles, ...] = ()
    """The images, in the order of their tokens."""
    name: str = ""
    """Where it came from, for messages: file and entry."""
