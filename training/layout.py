"""Packs images and their questions into one batch.

All questions about an image share its visual tokens: each is a branch that sees the prefix and itself only, starting
at the position after the image. A branch is then what the served model sees for that question alone.

Legend: B images, P prefix length (words before the image, then visual tokens, padded), Q branches an image,
T branch length (padded), S = P + Q * T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from services.common.types import ImageTiles


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One conversation about an image: what follows the image in the prompt, with its answers."""

    token_ids: tuple[int, ...]
    labels: tuple[int, ...]
    """The token itself where it belongs to an answer, else -100."""
    instruction: tuple[bool, ...]
    """Tokens of the user's own words."""
    answer_start: int
    """Index of the first answer token."""
    evidence_xyxy: tuple[float, float, float, float] | None = None
    """Where in the image the answer is, as fractions of width and height; used by the grounding loss only."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image and its branches. Every sample of a batch has the same words before the image."""

    image: ImageTiles
    prefix_ids: tuple[int, ...]
    branches: tuple[Branch, ...]


@dataclass(frozen=True, kw_only=True)
class TextBatch:
    """The words of a batch, padded."""

    prefix_ids: torch.Tensor
    """int64 [words before the image]."""
    token_ids_BQT: torch.Tensor
    labels_BQT: torch.Tensor
    instruction_BQT: torch.Tensor
    answer_start_BQ: torch.Tensor
    """0 marks a branch that is padding."""
    length_BQ: torch.Tensor


def pack_text(samples: Sequence[Sample], pad_id: int) -> TextBatch:
    branches = max(len(s.branches) for s in samples)
    length = max(len(b.token_ids) for s in samples for b in s.branches)
    shape = (len(samples), branches, length)
    ids, labels = torch.full(shape, pad_id), torch.full(shape, -100)
    instruction = torch.zeros(shape, dtype=torch.bool)
    start, lengths = torch.zeros(shape[:2], dtype=torch.long), torch.ones(shape[:2], dtype=torch.long)
    for b, sample in enumerate(samples):
        assert sample.prefix_ids == samples[0].prefix_ids
        for q, branch in enumerate(sample.branches):
            size = len(branch.token_ids)
            ids[b, q, :size] = torch.tensor(branch.token_ids)
            labels[b, q, :size] = torch.tensor(branch.labels)
            instruction[b, q, :size] = torch.tensor(branch.instruction)
            start[b, q], lengths[b, q] = branch.answer_start, size
    return TextBatch(
        prefix_ids=torch.tensor(samples[0].prefix_ids),
        token_ids_BQT=ids,
        labels_BQT=labels,
        instruction_BQT=instruction,
        answer_start_BQ=start,
        length_BQ=lengths,
    )


def positions(prefix_lens_B: torch.Tensor, prefix: int, branches: int, length: int) -> torch.Tensor:
    """Rotary positions [B, S]: the prefix counts up; every branch goes on where its own image's prefix ends."""
    in_prefix = torch.arange(prefix).expand(len(prefix_lens_B), prefix)
    in_branch = torch.arange(length).repeat(branches) + prefix_lens_B.unsqueeze(1)
    return torch.cat((in_prefix, in_branch), dim=1)


def attention_mask(prefix_lens_B: torch.Tensor, prefix: int, branches: int, length: int) -> torch.Tensor:
    """bool [B, 1, S, S]: causal; a branch sees the prefix's real tokens and itself. Padding sees itself."""
    total = prefix + branches * length
    branch_S = torch.cat((torch.full((prefix,), -1), torch.arange(branches).repeat_interleave(length)))
    causal_SS = torch.ones(total, total, dtype=torch.bool).tril()
    same_SS = (branch_S.unsqueeze(1) == branch_S) & (branch_S >= 0)
    real_BS = (torch.arange(total) < prefix_lens_B.unsqueeze(1)) & (branch_S < 0)
    mask = causal_SS & (same_SS | real_BS.unsqueeze(1))
    return (mask | torch.eye(total, dtype=torch.bool)).unsqueeze(1)
