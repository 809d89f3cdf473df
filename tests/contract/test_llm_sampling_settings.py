"""Sampling settings through the engine, against transformers' generate with the same ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from services.common.types import GenerateRequest, TokenEvent
from services.llm.engine import Engine
from tests import tiny_llm


def tokens_of(engine: Engine, asked: GenerateRequest) -> list[TokenEvent]:
    engine.submit(asked)
    events = []
    while engine.has_work():
        events += [event for _, event in engine.step() if isinstance(event, TokenEvent)]
    return events


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.7}, {"repetition_penalty": 0.9}], ids=str)
def test_greedy_answers_and_log_probabilities_equal_transformers(settings: dict[str, Any]) -> None:
    engine = tiny_llm.engine()
    lm = tiny_llm.reference_lm(tiny_llm.checkpoint())
    asked = tiny_llm.request(engine, images=(), max_tokens=24, logprobs=3, **settings)
    prompt_ids = torch.tensor([engine.prepare(asked).prompt.input_ids])
    expected = lm.generate(
        prompt_ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True, **settings,
    )  # fmt: skip
    events = tokens_of(engine, asked)
    answer = [token for event in events for token in event.token_ids]
    assert answer == expected.sequences[0, prompt_ids.shape[1] :].tolist()
    for event, logits_1V in zip(events, expected.logits, strict=True):
        (entry,) = event.logprobs
        values, ids = logits_1V[0].log_softmax(-1).topk(3)  # before any penalty
        assert entry.chosen.token_id == event.token_ids[0]
        assert [token.token_id for token in entry.top] == ids.tolist()
        assert [token.logprob for token in entry.top] == pytest.approx(values.tolist(), abs=1e-3)


@pytest.mark.parametrize("settings", [{"top_k": 4}, {"top_p": 0.2}, {"min_p": 0.5}], ids=str)
def test_drawn_tokens_lie_within_the_limits_and_repeat_with_the_seed(settings: dict[str, Any]) -> None:
    engine = tiny_llm.engine()
    asked = tiny_llm.request(engine, images=(30,), max_tokens=40, temperature=1.0, seed=3, logprobs=20, **settings)
    events = tokens_of(engine, asked)
    for entry in (event.logprobs[0] for event in events):
        share = torch.tensor([token.logprob for token in entry.top]).exp()
        kept = torch.ones(20, dtype=torch.bool)
        if "top_k" in settings:
            kept[settings["top_k"] :] = False
        if "top_p" in settings:
            kept = share.cumsum(0) - share < settings["top_p"]
        if "min_p" in settings:
            kept = share >= settings["min_p"] * share[0]
        allowed = [token.token_id for token, is_kept in zip(entry.top, kept.tolist(), strict=True) if is_kept]
        assert entry.chosen.token_id in allowed or kept.all()  # the limit may lie beyond the 20 that are reported
    again = tokens_of(engine, asked)
    assert [event.token_ids for event in again] == [event.token_ids for event in events]
