"""Packs images and their questions into one batch.

All questions about an image share its visual tokens: each is a branch that sees the prefix and itself only, starting
at the position after the image. A branch is then what the served model sees for that question alone.

Legend: B images, P prefix length (words before the image, then visual tokens, padded), Q branches an image,
T branch length (padded), S = P + Q * T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from services.common.types import ImageTiles

Boxes = Sequence[tuple[float, float, float, float]]
"""Left, top, right and bottom of each, as fractions of the image's width and height."""
ATTENTION_NAME = "focusllava_branches"
BLOCK = 320
"""Query rows of a causal block: what lies right of it is not computed."""


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One conversation about an image: what follows the image in the prompt, with its answers."""

    token_ids: tuple[int, ...]
    labels: tuple[int, ...]
    """The token itself where it belongs to an answer, else -100."""
    instruction: tuple[bool, ...]
    """Whether each token is one of the user's own words."""
    answer_start: int
    """Index of the first answer token."""
    evidence_xyxy: tuple[tuple[float, float, float, float], ...] = ()
    """Where in the image the answer is, as fractions of width and height; used by the grounding loss only."""
    asks_place: bool = False
    """Whether the answer is the evidence's place in the image."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image and its branches. Every sample of a batch has the same words before the image."""

    image: ImageTiles
    prefix_ids: tuple[int, ...]
    branches: tuple[Branch, ...]
    glyph_boxes: tuple[tuple[float, float, float, float], ...] = ()
    """Everything in the image that only full resolution shows, as fractions; an oracle's, where the source knows."""


@dataclass(frozen=True, kw_only=True)
class TextBatch:
    """The words of a batch, padded."""

    prefix_ids: torch.Tensor
    """int64 [words before the image]."""
    token_ids_BQT: torch.Tensor
    labels_BQT: torch.Tensor
    instruction_BQT: torch.Tensor
    answer_start_BQ: torch.Tensor
    """Index of each branch's first answer token; 0 marks a branch that is padding."""


def pack_text(samples: Sequence[Sample], pad_id: int) -> TextBatch:
    """The words of the samples, padded, on the CPU."""
    with torch.device("cpu"):
        return _pack_text(samples, pad_id)


def _pack_text(samples: Sequence[Sample], pad_id: int) -> TextBatch:
    branches = max(len(s.branches) for s in samples)
    length = max(len(b.token_ids) for s in samples for b in s.branches)
    shape = (len(samples), branches, length)
    ids, labels = torch.full(shape, pad_id), torch.full(shape, -100)
    instruction = torch.zeros(shape, dtype=torch.bool)
    start = torch.zeros(shape[:2], dtype=torch.long)
    for b, sample in enumerate(samples):
        assert sample.prefix_ids == samples[0].prefix_ids
        for q, branch in enumerate(sample.branches):
            size = len(branch.token_ids)
            ids[b, q, :size] = torch.tensor(branch.token_ids)
            labels[b, q, :size] = torch.tensor(branch.labels)
            instruction[b, q, :size] = torch.tensor(branch.instruction)
            start[b, q] = branch.answer_start
    return TextBatch(
        prefix_ids=torch.tensor(samples[0].prefix_ids),
        token_ids_BQT=ids,
        labels_BQT=labels,
        instruction_BQT=instruction,
        answer_start_BQ=start,
    )


def positions(prefix_lens_B: torch.Tensor, prefix: int, branches: int, length: int) -> torch.Tensor:
    """Rotary positions [B, S]: the prefix counts up; every branch goes on where its own image's prefix ends."""
    device = prefix_lens_B.device
    in_prefix = torch.arange(prefix, device=device).expand(len(prefix_lens_B), prefix)
    in_branch = torch.arange(length, device=device).repeat(branches) + prefix_lens_B.unsqueeze(1)
    return torch.cat((in_prefix, in_branch), dim=1)


def attention_mask(prefix_lens_B: torch.Tensor, prefix: int, branches: int, length: int) -> torch.Tensor:
    """bool [B, 1, Q * T, S], the branches' rows: a branch sees the prefix's real tokens and, causally, itself.

    The prefix's own rows are plainly causal: its padding is on the right, and nothing real sees it. Padding in a branch
    sees itself.
    """
    rows, device = branches * length, prefix_lens_B.device
    branch_R = torch.arange(branches, device=device).repeat_interleave(length)
    own_RR = (branch_R.unsqueeze(1) == branch_R) & torch.ones(rows, rows, dtype=torch.bool, device=device).tril()
    real_BP = torch.arange(prefix, device=device) < prefix_lens_B.unsqueeze(1)
    batch = len(prefix_lens_B)
    mask_BRS = torch.cat((real_BP.unsqueeze(1).expand(-1, rows, -1), own_RR.expand(batch, -1, -1)), dim=2)
    return mask_BRS.unsqueeze(1)


def branched_attention(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                       attention_mask: torch.Tensor | None, *, scaling: float, **_: Any
                       ) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' attention interface for a packed batch: [B, H, S, d] queries -> [B, S, H, d].

    With the mask above only the branches' rows pay for a mask; without one all rows are causal.
    """
    repeats = query.shape[1] // key.shape[1]
    query, key, value = query * scaling, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    prefix = query.shape[2] - (attention_mask.shape[2] if attention_mask is not None else 0)
    parts = []
    for start in range(0, prefix, BLOCK):
        stop = min(start + BLOCK, prefix)
        visible = torch.ones(stop - start, stop, dtype=torch.bool, device=query.device).tril(start)
        parts.append(_attend(query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], visible))
    if attention_mask is not None:
        parts.append(_attend(query[:, :, prefix:], key, value, attention_mask))
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    if query.is_cuda:
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=1.0)
    # Batched products beat the CPU's fused kernel: 75 ms against 132, forward and backward, for a layer of 6 images.
    bias = torch.zeros_like(visible, dtype=query.dtype).masked_fill_(~visible, -torch.inf)
    return (query @ key.transpose(-1, -2) + bias).softmax(-1) @ value


AttentionInterface.register(ATTENTION_NAME, branched_attention)
