"""A grounding loss, for pre-training a small model from nothing: it is to look where the answer is.

Not in the paper, which starts from models that already ground words in images. -log of the attention mass that the
tokens which predict the answer, and the instruction's words, put on the visual tokens of the evidence, averaged
over heads. Before that, in `reading_layers`, the last prompt token is to read the instruction.

Legend: S tokens of a packed row, R those of a sequence's branches, L tokens of a sequence, Q branches, H heads,
D LLM width, d head width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from services.checkpoint.config import FocusLlavaConfig
from services.common.grid import unpadded_hw
from services.common.settings import Amount, require
from services.modeling.attention import PackedRows
from services.modeling.loss import IGNORED
from services.sampler.text_guided import apply_rotary
from training.data.branches import Branch, Sample
from training.data.fonts import Box


@dataclass(frozen=True, kw_only=True)
class Grounding:
    """Settings of the loss, and the loss."""

    weight: Amount
    layers: tuple[int, ...] = ()
    """Layers in which the answer's tokens and the question's words are to look at the evidence."""
    reading_layers: tuple[int, ...] = ()
    """Layers below them, in which the last prompt token is to read the question."""

    def __post_init__(self) -> None:
        require(bool(self.taught_layers), "layers", self.layers, "one or more, or reading_layers")

    @property
    def taught_layers(self) -> list[int]:
        """Layers whose attention has a loss, ascending."""
        return sorted({*self.layers, *self.reading_layers})

    @contextlib.contextmanager
    def watching(
        self, layers: Sequence[nn.Module], samples: Sequence[Sample], config: FocusLlavaConfig
    ) -> Iterator[list[torch.Tensor]]:
        """While it lasts, a pass of these samples, all visual tokens among them, through these decoder layers adds its
        losses to what it yields: float32 scalars, whose mean is the loss."""
        evidence = [evidence_tokens(sample, config) for sample in samples]
        losses: list[torch.Tensor] = []

        def watch(index: int) -> Callable[..., None]:
            def look(layer: Any, args: tuple[torch.Tensor], given: dict[str, Any]) -> None:
                cos_1Sd, sin_1Sd = given["position_embeddings"]
                attention = branch_attention(layer, args[0][0], cos_1Sd[0], sin_1Sd[0], given["focus_rows"])
                if index in self.reading_layers:
                    losses.append(reading_loss(attention, samples))
                if index in self.layers:
                    losses.append(grounding_loss(attention, samples, evidence))

            return look

        hooks = [layers[i].register_forward_pre_hook(watch(i), with_kwargs=True) for i in self.taught_layers]
        try:
            yield losses
        finally:
            for hook in hooks:
                hook.remove()


class Evidence(NamedTuple):
    """Where a branch's answer is."""

    tokens: torch.Tensor
    """Ascending indices of visual tokens."""
    compares: bool
    """Whether the answer compares two places. Then only the question's words look, each for its own thing: the mean of
    both that an answer's token would take tells nothing of which is which."""


def evidence_tokens(sample: Sample, config: FocusLlavaConfig) -> list[Evidence | None]:
    """For each branch the tokens that its evidence's boxes touch, of all visual tokens of its image; or None.

    Of the base tile where the answer is a place: a patch there has the whole image around it, one of a grid tile only
    its tile. Else of the map: taught to look at either, the model looked for a table's numbers in the base tile, which
    is too coarse to show them.
    """
    side = config.patches_per_side
    rows, cols = sample.image.grid_hw
    top, bottom, left, right = unpadded_hw(sample.image.image_size_hw, (rows * side, cols * side))
    height, width = bottom - top, right - left
    found: list[Evidence | None] = []
    for branch in sample.branches:
        if branch.asks_place:
            cells = [_cells_under(box, side, side, side) for box in branch.evidence_xyxy]
        else:
            cells = [_cells_under(box, height, width, width + 1) + side**2 for box in branch.evidence_xyxy]
        compares = branch.asks_place and len(cells) > 1
        found.append(Evidence(torch.cat(cells).unique(), compares) if cells else None)
    return found


def _cells_under(box_xyxy: Box, height: int, width: int, stride: int) -> torch.Tensor:
    """Row-major indices of the cells of a height x width grid that a box touches; a row is `stride` long."""
    x0, y0, x1, y1 = box_xyxy
    rows = torch.arange(int(y0 * height), min(height, int(y1 * height) + 1))
    cols = torch.arange(int(x0 * width), min(width, int(x1 * width) + 1))
    return (rows.unsqueeze(1) * stride + cols).flatten()


def branch_attention(layer: Any, hidden_SD: torch.Tensor, cos_Sd: torch.Tensor, sin_Sd: torch.Tensor,
                     rows: PackedRows) -> list[torch.Tensor]:  # fmt: skip
    """Attention of the branches' tokens in a decoder layer, float32 [R, H, L] a sequence; computed apart, since fused
    attention does not tell. hidden_SD: what enters the layer."""
    attention, sizes = layer.self_attn, [each.whole for each in rows.lengths]
    normed_SD, shares = layer.input_layernorm(hidden_SD), []
    parts = zip(*(x.split(sizes) for x in (normed_SD, cos_Sd, sin_Sd)), strict=True)
    for number, (normed, cos, sin) in enumerate(parts):
        prefix = rows.lengths[number].prefix
        key = apply_rotary(attention.k_proj(normed).unflatten(-1, (-1, attention.head_dim)), cos, sin)
        query = attention.q_proj(normed[prefix:]).unflatten(-1, (-1, attention.head_dim))
        query = apply_rotary(query, cos[prefix:], sin[prefix:])
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores_RHL = torch.einsum("rhd,lhd->rhl", query, key).float() * attention.scaling
        visible_R1L = rows.mask(number, normed.device).unsqueeze(1)
        shares.append(scores_RHL.masked_fill(~visible_R1L, -torch.inf).softmax(-1))
    return shares


def grounding_loss(
    attention: Sequence[torch.Tensor], samples: Sequence[Sample], evidence: Sequence[Sequence[Evidence | None]]
) -> torch.Tensor:
    """-log mass on the evidence: of the tokens that predict the answer, and of the instruction's words, on average.

    Of "top left", "left" is predicted from "top": were the last prompt token alone to look, it would be a guess.
    """
    losses = []
    for share_RHL, sample, of_image in zip(attention, samples, evidence, strict=True):
        sizes = [len(branch.token_ids) for branch in sample.branches]
        for share_THL, branch, where in zip(share_RHL.split(sizes), sample.branches, of_image, strict=True):
            if where is None:
                continue
            mass_TH = share_THL[..., (where.tokens + len(sample.prefix_ids)).to(share_THL.device)].sum(-1)
            lost_T = -mass_TH.clamp(min=1e-6).log().mean(-1)
            for looks in (_predicts(branch, where), branch.instruction):
                looks_T = torch.tensor(looks).to(lost_T)
                losses.append((lost_T * looks_T).sum() / looks_T.sum().clamp(min=1))
    return torch.stack(losses).mean() if losses else attention[0].sum() * 0.0  # a batch may have no evidence at all


def _predicts(branch: Branch, where: Evidence) -> list[bool]:
    """Whether each token predicts one of the answer, and is to look: never where places are compared."""
    return [not where.compares and label != IGNORED for label in branch.labels[1:]] + [False]


def reading_loss(attention: Sequence[torch.Tensor], samples: Sequence[Sample]) -> torch.Tensor:
    """-log mass of the last prompt token on the instruction's words: read the question before looking.

    Hundreds of visual tokens drown a dozen words until a head has learned to tell them apart.
    """
    losses = []
    for share_RHL, sample in zip(attention, samples, strict=True):
        start = 0
        # A branch sees no other branch, so the words of all are its own.
        words = torch.tensor([token for branch in sample.branches for token in branch.instruction]).to(share_RHL)
        own_RHR = share_RHL[..., share_RHL.shape[-1] - len(words) :]
        last = []
        for branch in sample.branches:
            last.append(start + branch.answer_start - 1)
            start += len(branch.token_ids)
        losses.append(-(own_RHR[last] @ words).clamp(min=1e-6).log().mean(-1))
    return torch.cat(losses).mean()
