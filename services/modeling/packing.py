"""Conversations, with their visual tokens in place, one after the other in one packed row.

Legend: T tokens of all sequences, an image counted as one; S tokens with visual tokens in place; D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from services.common.errors import InvalidInput
from services.common.types import ImageTiles
from services.modeling.loss import IGNORED


class TrainedSequence(Protocol):
    """A conversation as the model takes it; `training.sequence.TrainingSequence` is one."""

    @property
    def input_ids(self) -> torch.Tensor:
        """int64 [S], one image token an image."""

    @property
    def labels(self) -> torch.Tensor:
        """int64 [S]: the token itself where it belongs to an answer, else -100."""

    @property
    def instruction(self) -> torch.Tensor:
        """bool [S]: whether the token is one of those whose attention chooses the visual tokens."""

    @property
    def images(self) -> Sequence[ImageTiles]:
        """The images, in the order of their tokens."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A `TrainedSequence` made here, of a padded batch."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    instruction: torch.Tensor
    images: tuple[ImageTiles, ...] = ()


def answer_tokens(sequences: Sequence[TrainedSequence]) -> int:
    """Tokens in the loss: those with a label, but for a sequence's first, which nothing predicts."""
    return sum(int((sequence.labels[1:] != IGNORED).sum()) for sequence in sequences)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The tokens of a packed row, on the model's device."""

    ids_S: torch.Tensor
    """int64: token ids, 0 in place of visual tokens (a placeholder's id may lie outside the table)."""
    label_S: torch.Tensor
    """int64: -100 at a sequence's first token and at visual tokens."""
    visual_S: torch.Tensor
    """bool."""
    instruction_S: torch.Tensor
    """bool."""
    position_S: torch.Tensor
    """int64: place in the sequence, every visual token counted, kept or not."""
    source_S: torch.Tensor
    """int64: which of the T tokens it is, or is part of."""
    lengths: tuple[int, ...]
    """Tokens of each sequence."""

    def target_S(self) -> torch.Tensor:
        """int64: the token that follows each one, -100 where it is in no loss."""
        end = self.label_S.new_full((1,), IGNORED)
        return torch.cat((self.label_S[1:], end))

    def select(self, stays_S: torch.Tensor) -> Packed:
        """The tokens that stay, where bool [S] is true."""
        lengths = tuple(int(part.sum()) for part in stays_S.split(list(self.lengths)))
        names = ("ids_S", "label_S", "visual_S", "instruction_S", "position_S", "source_S")
        return dataclasses.replace(self, lengths=lengths, **{name: getattr(self, name)[stays_S] for name in names})


def pack(sequences: Sequence[TrainedSequence], visual_counts: Sequence[int], *, image_token_id: int,
         device: torch.device) -> Packed:  # fmt: skip
    """Puts `visual_counts` tokens, one entry an image, in place of each image token.

    Raises InvalidInput where there are more or fewer image tokens than images.
    """
    for number, sequence in enumerate(sequences):
        found = int((sequence.input_ids == image_token_id).sum())
        images = len(sequence.images)
        if found != images:
            raise InvalidInput(f"has {found} image tokens for {images} images", field=_name(sequence, number))
    sizes = [len(sequence.input_ids) for sequence in sequences]
    ids_T = torch.cat([sequence.input_ids.to(device) for sequence in sequences])
    labels_T = torch.cat([sequence.labels.to(device) for sequence in sequences])
    instruction_T = torch.cat([sequence.instruction.to(device) for sequence in sequences])
    image_T = ids_T == image_token_id
    counts_T = torch.ones_like(ids_T)
    counts_T[image_T] = torch.tensor(visual_counts, dtype=torch.int64, device=device)
    source_S = torch.arange(len(ids_T), device=device).repeat_interleave(counts_T)
    lengths = [int(part.sum()) for part in counts_T.split(sizes)]
    position_S = torch.cat([torch.arange(length, device=device) for length in lengths])
    visual_S = image_T[source_S]
    return Packed(
        ids_S=ids_T[source_S].masked_fill(visual_S, 0),
        label_S=labels_T[source_S].masked_fill(visual_S | (position_S == 0), IGNORED),
        visual_S=visual_S,
        instruction_S=instruction_T[source_S] & ~visual_S,
        position_S=position_S,
        source_S=source_S,
        lengths=tuple(lengths),
    )


def _name(sequence: TrainedSequence, number: int) -> str:
    return getattr(sequence, "name", "") or f"sequence {number}"
