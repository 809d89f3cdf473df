"""Sequences, with their visual tokens in place, one after the other in one packed row.

A conversation is one causal sequence. A sequence of branches is a prefix, with its images, that many questions share:
each branch goes on from it as if it were alone, so that the prefix is computed once.

Legend: T tokens of all sequences, an image counted as one; S tokens with visual tokens in place; D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from services.common.errors import InvalidInput
from services.common.types import ImageTiles
from services.modeling.loss import IGNORED


@dataclass(frozen=True, kw_only=True)
class TrainedSequence:
    """A conversation, or the branches of one prefix, as the model takes them. An image is one image token, which the
    model replaces by the image's visual tokens."""

    input_ids: torch.Tensor
    """int64 [T]."""
    labels: torch.Tensor
    """int64 [T]: the token itself where it belongs to an answer, else -100; image tokens and user words never do. Where
    a template ends answers with nothing, the token behind an answer is labelled as the end token that belongs there."""
    instruction: torch.Tensor
    """bool [T]: whether the token is one of the user's own words, in any turn; the text-guided sampler reads these."""
    images: tuple[ImageTiles, ...] = ()
    """The images, in the order of their tokens."""
    name: str = ""
    """Where it came from, for messages: file and entry."""
    number: int = 0
    """Its number among the entries of its data, which is the same wherever the data lies."""
    branches: tuple[int, ...] = ()
    """Tokens of each branch, at the end of the T, one branch after the other; none for a conversation."""

    @property
    def parts(self) -> tuple[int, ...]:
        """Tokens of the prefix and of each branch. A conversation is one branch of an empty prefix."""
        branches = self.branches or (len(self.input_ids),)
        return (len(self.input_ids) - sum(branches), *branches)


def answers_in(sequences: Sequence[TrainedSequence]) -> int:
    """Tokens in the loss: those with a label, but for the first of a sequence or branch, which nothing predicts."""
    parts = (part for sequence in sequences for part in sequence.labels.split(sequence.parts))
    return sum(int((labels[1:] != IGNORED).sum()) for labels in parts)


class Lengths(NamedTuple):
    """The tokens of one packed sequence."""

    prefix: int
    branches: tuple[int, ...]

    @property
    def whole(self) -> int:
        return self.prefix + sum(self.branches)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The tokens of a packed row, on the model's device."""

    ids_S: torch.Tensor
    """int64: token ids, 0 in place of visual tokens (a placeholder's id may lie outside the table)."""
    label_S: torch.Tensor
    """int64: -100 at visual tokens, and at the first token of a sequence and of a branch."""
    visual_S: torch.Tensor
    """bool."""
    instruction_S: torch.Tensor
    """bool."""
    position_S: torch.Tensor
    """int64: place in the sequence, a branch's on from its prefix's; every visual token counts, kept or not."""
    source_S: torch.Tensor
    """int64: which of the T tokens it is, or is part of."""
    lengths: tuple[Lengths, ...]
    """Tokens of each sequence."""

    @property
    def branches(self) -> int:
        """Branches of all sequences."""
        return sum(len(each.branches) for each in self.lengths)

    def target_S(self) -> torch.Tensor:
        """int64: the token that follows each one, -100 where it is in no loss."""
        end = self.label_S.new_full((1,), IGNORED)
        return torch.cat((self.label_S[1:], end))

    def branch_S(self) -> torch.Tensor:
        """int64: the branch that each token belongs to, -1 for those of a prefix that branches share."""
        owners, sizes, first = [], [], 0
        for prefix, branches in self.lengths:
            owners += [-1, *range(first, first := first + len(branches))]
            sizes += [prefix, *branches]
        owner, size = (torch.tensor(values, device=self.ids_S.device) for values in (owners, sizes))
        return owner.repeat_interleave(size)

    def visual_counts(self) -> list[int]:
        """Visual tokens that each branch sees."""
        sizes = (n for each in self.lengths for n in (each.prefix, *each.branches))
        ends = torch.tensor(list(itertools.accumulate(sizes, initial=0)), device=self.visual_S.device)
        counts = iter(nn.functional.pad(self.visual_S.cumsum(0), (1, 0))[ends].diff().tolist())
        found = []
        for each in self.lengths:
            prefix = next(counts)
            found += [prefix + next(counts) for _ in each.branches]
        return found

    def rows(self) -> list[torch.Tensor]:
        """int64: the places in the row of all tokens that each branch sees, its own last."""
        found, start = [], 0
        every_S = torch.arange(len(self.ids_S), device=self.ids_S.device)
        for each in self.lengths:
            own = start + each.prefix
            prefix = every_S[start:own]
            for length in each.branches:
                found.append(torch.cat((prefix, every_S[own : own + length])))
                own += length
            start = own
        return found

    def take(self, rows: Sequence[torch.Tensor]) -> Packed:
        """Sequences of their own, each of the tokens at these places."""
        at_S = torch.cat(list(rows))
        names = ("ids_S", "label_S", "visual_S", "instruction_S", "position_S", "source_S")
        lengths = tuple(Lengths(0, (len(row),)) for row in rows)
        return Packed(lengths=lengths, **{name: getattr(self, name)[at_S] for name in names})


def pack(sequences: Sequence[TrainedSequence], visual_counts: Sequence[int], *, image_token_id: int,
         device: torch.device) -> Packed:  # fmt: skip
    """Puts `visual_counts` tokens, one entry an image, in place of each image token.

    Raises InvalidInput where there are more or fewer image tokens than images, for branches that do not fit, and for
    labels in a prefix.
    """
    for number, sequence in enumerate(sequences):
        name = sequence.name or f"sequence {number}"
        if min(sequence.parts) < 0 or not all(sequence.branches):
            wrong = f"has branches of {sequence.branches} tokens, {len(sequence.input_ids)} in all"
            raise InvalidInput(wrong, field=name)
        if (sequence.labels[: sequence.parts[0]] != IGNORED).any():
            raise InvalidInput("has labels in the prefix that its branches share", field=name)
        found, images = int((sequence.input_ids == image_token_id).sum()), len(sequence.images)
        if found != images:
            raise InvalidInput(f"has {found} image tokens for {images} images", field=name)
    ids_T = torch.cat([sequence.input_ids.to(device) for sequence in sequences])
    labels_T = torch.cat([sequence.labels.to(device) for sequence in sequences])
    instruction_T = torch.cat([sequence.instruction.to(device) for sequence in sequences])
    image_T = ids_T == image_token_id
    counts_T = torch.ones_like(ids_T)
    counts_T[image_T] = torch.tensor(visual_counts, dtype=torch.int64, device=device)
    source_S = torch.arange(len(ids_T), device=device).repeat_interleave(counts_T)
    sizes = iter([int(part.sum()) for part in counts_T.split([n for each in sequences for n in each.parts])])
    lengths = []
    for sequence in sequences:
        prefix, *branches = itertools.islice(sizes, len(sequence.parts))
        lengths.append(Lengths(prefix, tuple(branches)))
    within = [torch.arange(n, device=device) for each in lengths for n in (each.prefix, *each.branches)]
    after = [n for each in lengths for n in (0, *[each.prefix] * len(each.branches))]
    visual_S = image_T[source_S]
    return Packed(
        ids_S=ids_T[source_S].masked_fill(visual_S, 0),
        label_S=labels_T[source_S].masked_fill(visual_S | (torch.cat(within) == 0), IGNORED),
        visual_S=visual_S,
        instruction_S=instruction_T[source_S] & ~visual_S,
        position_S=torch.cat([place + start for place, start in zip(within, after, strict=True)]),
        source_S=source_S,
        lengths=tuple(lengths),
    )
