"""A grounding loss for pre-training from nothing: look where the answer is.

Not in the paper, which starts from models that already ground words in images. -log of the attention mass that the
last prompt token puts on the visual tokens of the evidence, averaged over heads.
"""

from __future__ import annotations

import torch
from torch import nn

from services.encoder.model import EncodedImage
from services.sampler.text_guided import apply_rotary
from training.layout import Sample, TextBatch


def evidence_tokens(sample: Sample, encoded: EncodedImage) -> list[torch.Tensor | None]:
    """For each branch, indices of the full-resolution map's tokens that its evidence box touches, or None."""
    if encoded.sampled is not None:
        return [None] * len(sample.branches)
    height, width = encoded.map_hw
    first = len(encoded.tokens_ND) - height * (width + 1)
    found: list[torch.Tensor | None] = []
    for branch in sample.branches:
        if branch.evidence_xyxy is None:
            found.append(None)
            continue
        x0, y0, x1, y1 = branch.evidence_xyxy
        rows = torch.arange(int(y0 * height), min(height, int(y1 * height) + 1))
        cols = torch.arange(int(x0 * width), min(width, int(x1 * width) + 1))
        found.append((first + rows.unsqueeze(1) * (width + 1) + cols).flatten())
    return found


def grounding_loss(layer: nn.Module, hidden_BSD: torch.Tensor, cos_BSd: torch.Tensor, sin_BSd: torch.Tensor,
                   mask_B1SS: torch.Tensor, text: TextBatch, prefix: int,
                   evidence: list[list[torch.Tensor | None]]) -> torch.Tensor:  # fmt: skip
    """Scalar float32 loss of one layer; `hidden` is what enters it."""
    attention, before = layer.self_attn, len(text.prefix_ids)
    length = text.token_ids_BQT.shape[2]
    where = [(b, q) for b, of_image in enumerate(evidence) for q, tokens in enumerate(of_image) if tokens is not None]
    if not where:
        return hidden_BSD.new_zeros((), dtype=torch.float32)
    rows = torch.tensor([b for b, _ in where])
    last = torch.tensor([prefix + q * length + int(text.answer_start_BQ[b, q]) - 1 for b, q in where])
    normed = layer.input_layernorm(hidden_BSD)
    key = apply_rotary(attention.k_proj(normed).unflatten(-1, (-1, attention.head_dim)), cos_BSd, sin_BSd)
    query = attention.q_proj(normed[rows, last]).unflatten(-1, (-1, attention.head_dim))
    query = apply_rotary(query, cos_BSd[rows, last], sin_BSd[rows, last])
    key = key.repeat_interleave(query.shape[1] // key.shape[2], dim=2)
    target = torch.zeros(len(where), hidden_BSD.shape[1], dtype=torch.bool)
    for n, (b, q) in enumerate(where):
        tokens = evidence[b][q]
        assert tokens is not None
        target[n, tokens + before] = True
    losses = []
    # One image at a time: the keys of an image serve all its branches without being copied.
    for b in rows.unique().tolist():
        of_image = rows == b
        scores = torch.einsum("qhd,shd->qhs", query[of_image].float(), key[b].float()) * attention.scaling
        scores = scores.masked_fill(~mask_B1SS[b, 0, last[of_image]].unsqueeze(1), -torch.inf)
        mass = (scores.log_softmax(-1).masked_fill(~target[of_image].unsqueeze(1), -torch.inf)).logsumexp(-1)
        losses.append(-mass.mean(1))
    return torch.cat(losses).mean()
