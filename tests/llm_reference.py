"""A slow reference that keeps no cache and decides in loops, and a look at the engine's logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from services.common.types import GenerateRequest, SampledToken
from services.llm.engine import Engine
from tests import tiny_llm

PRUNE_LAYER = 2


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def causal_mask(size: int) -> torch.Tensor:
    return torch.full((size, size), torch.finfo(torch.float32).min).triu(1)[None, None]


@contextmanager
def forced_tokens(tokens: Sequence[int]) -> Iterator[list[torch.Tensor]]:
    """The engine's one request goes on with these tokens whatever the logits; yields the list that the logits go to."""
    seen: list[torch.Tensor] = []

    def take(logits_nV: torch.Tensor, *_: Any, **__: Any) -> list[SampledToken]:
        seen.append(logits_nV[0])
        return [SampledToken(token_id=tokens[len(seen) - 1])]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("services.llm.engine.sample", take)
        yield seen


def reference_forward(lm: Any, hidden_SD: torch.Tensor, prune: dict[str, Any] | None) -> tuple[torch.Tensor, list[int]]:
    """Logits [S', V] of a whole sequence, recomputed from its embeddings with explicit masks; and the kept indices.

    prune: instruction, visual (positions) and threshold, applied before layer PRUNE_LAYER; None prunes nothing.
    """
    position_S = torch.arange(len(hidden_SD))
    hidden_1SD, kept = hidden_SD[None], []
    for index, layer in enumerate(lm.model.layers):
        rotary = lm.model.rotary_emb(hidden_1SD, position_S[None])
        if prune and index == PRUNE_LAYER:
            kept = naive_kept(layer, hidden_1SD[0], rotary, **prune)
            dropped = {p for i, p in enumerate(prune["visual"]) if i not in kept}
            position_S = torch.tensor([p for p in position_S.tolist() if p not in dropped])
            hidden_1SD = hidden_1SD[:, position_S]
            rotary = lm.model.rotary_emb(hidden_1SD, position_S[None])
        hidden_1SD = layer(
            hidden_1SD,
            attention_mask=causal_mask(len(position_S)),
            position_ids=position_S[None],
            position_embeddings=rotary,
        )
    return lm.lm_head(lm.model.norm(hidden_1SD))[0], kept


def naive_kept(
    layer: Any, hidden_SD: torch.Tensor, rotary: Any, instruction: list[int], visual: list[int], threshold: float
) -> list[int]:
    """Eq. 6-9 in loops."""
    attention, normed_SD = layer.self_attn, layer.input_layernorm(hidden_SD)
    query_1HSd = attention.q_proj(normed_SD).view(1, len(hidden_SD), -1, attention.head_dim).transpose(1, 2)
    key_1GSd = attention.k_proj(normed_SD).view(1, len(hidden_SD), -1, attention.head_dim).transpose(1, 2)
    query_1HSd, key_1GSd = apply_rotary_pos_emb(query_1HSd, key_1GSd, *rotary)
    share = [0.0] * len(visual)
    for token in instruction:
        best = torch.zeros(len(visual))
        for head in range(query_1HSd.shape[1]):
            key_Sd = key_1GSd[0, head // attention.num_key_value_groups]
            scores = torch.stack([query_1HSd[0, head, token] @ key_Sd[v] for v in visual]) * attention.head_dim**-0.5
            best = torch.maximum(best, scores.softmax(0))
        share = [s + b / len(instruction) for s, b in zip(share, best.tolist(), strict=True)]
    kept: list[int] = []
    for index in sorted(range(len(visual)), key=lambda i: -share[i]):
        if sum(share[i] for i in kept) >= threshold * sum(share):
            break
        kept.append(index)
    return sorted(kept)


def reference_generate(
    lm: Any, engine: Engine, asked: GenerateRequest, steps: int, threshold: float | None
) -> tuple[list[int], list[int]]:
    """Greedy tokens with everything recomputed for each one; and the kept visual tokens."""
    embeddings_SD = tiny_llm.reference_embeddings(lm, engine, asked)
    prompt = engine.prepare(asked).prompt
    prune = None
    if threshold is not None:
        visual = [p for first, last in prompt.visual_spans for p in range(first, last)]
        prune = {"instruction": list(prompt.instruction_positions), "visual": visual, "threshold": threshold}
    tokens: list[int] = []
    kept: list[int] = []
    with torch.no_grad():
        for _ in range(steps):
            logits, kept = reference_forward(lm, embeddings_SD, prune)
            tokens.append(int(logits[-1].argmax()))
            embeddings_SD = torch.cat([embeddings_SD, lm.model.embed_tokens.weight[tokens[-1]][None]])
    return tokens, kept
