"""A grounding loss, for pre-training a small model from nothing: it is to look where the answer is.

Not in the paper, which starts from models that already ground words in images. -log of the attention mass that the
tokens which predict the answer, and the instruction's words, put on the visual tokens of the evidence, averaged
over heads. Before that, in `reading_layers`, the last prompt token is to read the instruction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from services.common.settings import Amount, require
from services.encoder.model import EncodedImage
from services.sampler.text_guided import apply_rotary
from training.data.fonts import Box
from training.layout import Sample, TextBatch


@dataclass(frozen=True, kw_only=True)
class Grounding:
    """Settings of the loss, and the loss as the joint model takes it (`training.hooks.AttentionLossHook`)."""

    weight: Amount
    layers: tuple[int, ...] = ()
    """Layers in which the answer's tokens and the question's words are to look at the evidence."""
    reading_layers: tuple[int, ...] = ()
    """Layers below them, in which the last prompt token is to read the question."""

    def __post_init__(self) -> None:
        require(bool(self.taught_layers), "layers", self.layers, "one or more, or reading_layers")

    @property
    def taught_layers(self) -> set[int]:
        return {*self.layers, *self.reading_layers}

    def evidence(self, samples: Sequence[Sample], encoded: Sequence[EncodedImage]) -> list[list[Evidence | None]]:
        """The evidence of each image's branches."""
        return [evidence_tokens(*pair) for pair in zip(samples, encoded, strict=True)]

    def losses(self, index: int, layer: nn.Module, hidden_BSD: torch.Tensor, cos_BSd: torch.Tensor,
               sin_BSd: torch.Tensor, mask_B1RS: torch.Tensor, text: TextBatch, prefix: int,
               evidence: list[list[Evidence | None]]) -> list[torch.Tensor]:  # fmt: skip
        attention = branch_attention(layer, hidden_BSD, cos_BSd, sin_BSd, mask_B1RS, text, prefix)
        found = []
        if index in self.reading_layers:
            found.append(reading_loss(attention, text, prefix))
        if index in self.layers:
            found.append(grounding_loss(attention, text, evidence))
        return found


class Evidence(NamedTuple):
    """Where a branch's answer is."""

    tokens: torch.Tensor
    """Ascending indices of visual tokens."""
    compares: bool
    """Whether the answer compares two places. Then only the question's words look, each for its own thing: the mean of
    both that an answer's token would take tells nothing of which is which."""


def evidence_tokens(sample: Sample, encoded: EncodedImage) -> list[Evidence | None]:
    """For each branch the tokens that its evidence's boxes touch, or None.

    Of the base tile where the answer is a place: a patch there has the whole image around it, one of a grid tile only
    its tile. Else of the map: taught to look at either, the model looked for a table's numbers in the base tile, which
    is too coarse to show them.
    """
    if encoded.sampled is not None:
        return [None] * len(sample.branches)
    height, width = encoded.map_hw
    base = len(encoded.tokens_ND) - height * (width + 1)
    side = math.isqrt(base)
    found: list[Evidence | None] = []
    for branch in sample.branches:
        if branch.asks_place:
            cells = [_cells_under(box, side, side, side) for box in branch.evidence_xyxy]
        else:
            cells = [_cells_under(box, height, width, width + 1) + base for box in branch.evidence_xyxy]
        compares = branch.asks_place and len(cells) > 1
        found.append(Evidence(torch.cat(cells).unique(), compares) if cells else None)
    return found


def _cells_under(box_xyxy: Box, height: int, width: int, stride: int) -> torch.Tensor:
    """Row-major indices of the cells of a height x width grid that a box touches; a row is `stride` long."""
    x0, y0, x1, y1 = box_xyxy
    rows = torch.arange(int(y0 * height), min(height, int(y1 * height) + 1))
    cols = torch.arange(int(x0 * width), min(width, int(x1 * width) + 1))
    return (rows.unsqueeze(1) * stride + cols).flatten()


def branch_attention(layer: nn.Module, hidden_BSD: torch.Tensor, cos_BSd: torch.Tensor, sin_BSd: torch.Tensor,
                     mask_B1RS: torch.Tensor, text: TextBatch, prefix: int) -> list[torch.Tensor]:  # fmt: skip
    """Attention of every branch token, float32 [Q, T, H, S] an image; computed apart, since SDPA does not tell.

    `hidden` is what enters the layer; branches start at `prefix`, and the mask has their R rows only.
    """
    attention, shape = layer.self_attn, text.token_ids_BQT.shape[1:]
    normed = layer.input_layernorm(hidden_BSD)
    key = apply_rotary(attention.k_proj(normed).unflatten(-1, (-1, attention.head_dim)), cos_BSd, sin_BSd)
    query = attention.q_proj(normed[:, prefix:]).unflatten(-1, (-1, attention.head_dim))
    query = apply_rotary(query, cos_BSd[:, prefix:], sin_BSd[:, prefix:])
    key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    shares = []
    for b in range(len(hidden_BSD)):
        scores = torch.einsum("thd,shd->ths", query[b], key[b]).float() * attention.scaling
        visible = mask_B1RS[b, 0].unsqueeze(1)
        shares.append(scores.masked_fill(~visible, -torch.inf).softmax(-1).unflatten(0, shape))
    return shares


def grounding_loss(
    attention: list[torch.Tensor], text: TextBatch, evidence: list[list[Evidence | None]]
) -> torch.Tensor:
    """-log mass on the evidence: of the tokens that predict the answer, and of the instruction's words, on average.

    Of "top left", "left" is predicted from "top": were the last prompt token alone to look, it would be a guess.
    """
    before, losses = len(text.prefix_ids), []
    for b, of_image in enumerate(evidence):
        target_QS = torch.zeros(attention[b].shape[0], attention[b].shape[-1])  # filled on the CPU, then moved
        compares_Q = torch.zeros(len(target_QS), dtype=torch.bool)
        for q, of_branch in enumerate(of_image):
            if of_branch is not None:
                target_QS[q, of_branch.tokens + before] = 1
                compares_Q[q] = of_branch.compares
        target_QS, compares_Q = target_QS.to(attention[b].device), compares_Q.to(attention[b].device)
        grounded = target_QS.any(1)
        lost_QT = -torch.einsum("qths,qs->qth", attention[b], target_QS).clamp(min=1e-6).log().mean(-1)[grounded]
        predicts_QT = nn.functional.pad(text.labels_BQT[b, grounded, 1:] != -100, (0, 1))
        predicts_QT &= ~compares_Q[grounded].unsqueeze(1)
        for looks_QT in (predicts_QT, text.instruction_BQT[b, grounded]):
            losses.append((lost_QT * looks_QT).sum(1) / looks_QT.sum(1).clamp(min=1))
    lost = torch.cat(losses)
    return lost.sum() / max(1, len(lost))  # a batch may have no evidence at all


def reading_loss(attention: list[torch.Tensor], text: TextBatch, prefix: int) -> torch.Tensor:
    """-log mass of the last prompt token on the instruction's words: read the question before looking.

    Hundreds of visual tokens drown a dozen words until a head has learned to tell them apart.
    """
    losses = []
    for b, share_QTHS in enumerate(attention):
        real = text.answer_start_BQ[b] > 0
        last = text.answer_start_BQ[b, real] - 1
        own_QHTT = share_QTHS[real, last][..., prefix:].unflatten(-1, text.token_ids_BQT.shape[1:])
        words_QT = text.instruction_BQT[b, real].float()
        # A branch sees no other branch, so the sum over branches is its own.
        losses.append(-torch.einsum("qhbt,qt->qh", own_QHTT, words_QT).clamp(min=1e-6).log().mean(-1))
    return torch.cat(losses).mean()
