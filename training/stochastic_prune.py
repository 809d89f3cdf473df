"""Text-guided pruning in training: layer and threshold drawn at random, one decision a branch (Sec. 3.3, Tab. 6)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from services.common.errors import InvalidInput
from services.common.settings import require
from services.sampler.text_guided import apply_rotary, keep_by_share, text_importance


@dataclass(frozen=True, kw_only=True)
class PruneSchedule:
    """How the layer i and the threshold gamma of a step are drawn. Equal ends make them fixed ("Train" of Tab. 6)."""

    layers: tuple[int, int] = (8, 24)
    """First and last layer of the uniform draw, both included. One draw a micro-batch: its rows leave together."""
    thresholds: tuple[float, float] = (0.7, 1.0)
    """Ends of the uniform draw, one draw an image-text pair."""

    def __post_init__(self) -> None:
        (first, last), (low, high) = self.layers, self.thresholds
        require(1 <= first <= last, "layers", self.layers, "an ascending pair from 1 on")
        require(0 < low <= high <= 1, "thresholds", self.thresholds, "an ascending pair in (0, 1]")

    def draw_layer(self, rng: random.Random) -> int:
        return rng.randint(*self.layers)

    def draw_threshold(self, rng: random.Random) -> float:
        return rng.uniform(*self.thresholds)


def check_trained_are_on(model: Mapping[str, Any], *, vision_sampler: bool, prune: PruneSchedule | None) -> None:
    """Raises InvalidInput where a stage's `model` turns a sampler off that the stage trains."""
    for sampler, trained, by in (
        ("vision_sampler", vision_sampler, "vision_sampler: true"),
        ("text_sampler", prune is not None, "prune"),
    ):
        fields = model.get(sampler)
        if trained and isinstance(fields, dict) and fields.get("enabled") is False:
            wrong = f"is false, and stage.{by} trains it: leave one out"
            raise InvalidInput(wrong, field=f"model.{sampler}.enabled")


@torch.no_grad()
def decide(layer: nn.Module, hidden_BSD: torch.Tensor, cos_BSd: torch.Tensor, sin_BSd: torch.Tensor,
           instruction_BQT: torch.Tensor, before: int, visual_lens: list[int], prefix: int,
           thresholds: list[list[float]]) -> list[list[torch.Tensor]]:  # fmt: skip
    """Kept visual tokens (ascending indices from the first visual token) of every branch, by the served model's rule.

    `before` words precede the image; branches start at `prefix`.
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden_BSD)
    head = attention.head_dim
    visual = slice(before, before + max(visual_lens))
    key = attention.k_proj(normed[:, visual]).unflatten(-1, (-1, head))
    key = apply_rotary(key, cos_BSd[:, visual], sin_BSd[:, visual])
    query = attention.q_proj(normed[:, prefix:]).unflatten(-1, (-1, head))
    query = apply_rotary(query, cos_BSd[:, prefix:], sin_BSd[:, prefix:]).unflatten(1, instruction_BQT.shape[1:])
    decisions = []
    for b, count in enumerate(visual_lens):
        row = []
        for q, threshold in enumerate(thresholds[b]):
            asked = query[b, q][instruction_BQT[b, q]]
            if not len(asked):
                row.append(torch.arange(count, device=hidden_BSD.device))
                continue
            row.append(keep_by_share(text_importance(asked, key[b, :count], attention.scaling), threshold))
        decisions.append(row)
    return decisions


def gather_index(
    kept: list[list[torch.Tensor]], before: int, prefix: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each branch's own sequence comes from after pruning: words before, kept visual tokens, branch, padding.

    Returns source indices [B * Q, S'] into [S], and the start of the branch in each row [B * Q].
    """
    rows, starts = [], []
    device = kept[0][0].device
    words, branch = torch.arange(before, device=device), torch.arange(length, device=device)
    for of_image in kept:
        for q, visual in enumerate(of_image):
            rows.append(torch.cat((words, visual + before, prefix + q * length + branch)))
            starts.append(before + len(visual))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor(starts, device=device)


def stage_index(
    kept_R: list[torch.Tensor], before: int, starts_R: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each row's new sequence comes from in its old one, [R, S'], and where its branch starts now, [R]."""
    device = starts_R.device
    words, branch = torch.arange(before, device=device), torch.arange(length, device=device)
    rows = [torch.cat((words, before + kept, start + branch)) for kept, start in zip(kept_R, starts_R, strict=True)]
    starts = torch.tensor([before + len(kept) for kept in kept_R], device=device)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), starts
