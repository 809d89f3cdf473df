"""Equal beginnings of prompts go through the lower layers once; what the upper layers see is each question's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from services.common.types import GenerateRequest, ImagePart, PromptTurn, TextPart
from services.llm.engine import Engine
from tests import tiny_llm


def lower_tokens(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each step through the lower layers, as they come."""
    seen: list[int] = []
    run_layers = engine.decoder.run_layers

    def spy(hidden_SD: torch.Tensor, rotary: Any, first: int, last: int, step: Any) -> torch.Tensor:
        if first == 0:
            seen.append(len(hidden_SD))
        return run_layers(hidden_SD, rotary, first, last, step)

    monkeypatch.setattr(engine.decoder, "run_layers", spy)
    return seen


def ids(engine: Engine, requests: list[GenerateRequest]) -> dict[str, list[int]]:
    return {name: answer[0] for name, answer in tiny_llm.run(engine, requests).items()}


def test_equal_requests_at_once_and_another_question_later_share_the_lower_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, engine = tiny_llm.engine(prefix_reuse=False), tiny_llm.engine()
    first, other = (
        tiny_llm.request(plain, f"r{i}", images=(150,), question=tiny_llm.QUESTIONS[i], threshold=0.5, max_tokens=12)
        for i in range(2)
    )
    same = replace(first, request_id="same")
    expected = ids(plain, [first, same, other])
    seen = lower_tokens(engine, monkeypatch)
    sequences = {}

    def run(*requests: GenerateRequest) -> dict[str, list[int]]:
        for asked in requests:
            engine.submit(asked)
        sequences.update(engine._sequences)
        return ids(engine, [])

    got = run(first, same)
    length = sequences["r0"].prompt_len
    assert seen[0] == length + length % 16, "the second computes only what fills no block"
    assert (sequences["r0"].reused_tokens, sequences["same"].reused_tokens) == (0, length - length % 16)
    seen.clear()
    got |= run(other)
    assert sequences["r1"].reused_tokens >= 144
    assert seen[0] == sequences["r1"].prompt_len - sequences["r1"].reused_tokens
    assert got == expected
    assert engine.stats().prompt_tokens_reused == sum(s.reused_tokens for s in sequences.values())
    kept = {name: sequence.decision.kept.tolist() for name, sequence in sequences.items()}
    assert kept["r0"] == kept["same"] != kept["r1"], "every question selects for itself"


def test_a_prompt_that_is_known_whole_still_gives_its_answer() -> None:
    engine = tiny_llm.engine()
    words = tiny_llm.request(engine, images=())
    base = engine.prepare(words).prompt_len
    # An image that fills the prompt up to whole blocks: nothing at all is left for the lower layers.
    count = next(n for n in range(20, 60) if engine.prepare(tiny_llm.request(engine, images=(n,))).prompt_len % 16 == 0)
    assert count + base > 16
    asked = tiny_llm.request(engine, images=(count,), threshold=0.6, max_tokens=10)
    first, again = ids(engine, [asked]), ids(engine, [asked])
    assert first == again
    assert engine.stats().prompt_tokens_reused == engine.prepare(asked).prompt_len


def test_a_follow_up_selects_from_what_the_lower_layers_still_hold() -> None:
    plain, engine = tiny_llm.engine(prefix_reuse=False), tiny_llm.engine(max_batch_tokens=60)
    first = tiny_llm.request(plain, "first", images=(200,), keep_ratio=0.2, max_tokens=10)
    follow_up = replace(
        first,
        request_id="second",
        turns=(
            *first.turns,
            PromptTurn(role="assistant", parts=(TextPart(text="The number is seven."),)),
            PromptTurn(role="user", parts=(TextPart(text="And which colour is the circle?"),)),
        ),
    )
    expected = tiny_llm.run(plain, [first, follow_up])
    engine.submit(first)
    kept = {"first": engine._sequences["first"]}
    got = tiny_llm.run(engine)
    engine.submit(follow_up)
    kept["second"] = engine._sequences["second"]
    got |= tiny_llm.run(engine)
    assert {r: a[0] for r, a in got.items()} == {r: a[0] for r, a in expected.items()}
    assert kept["second"].reused_tokens > 200
    assert len(kept["first"].decision.kept) == len(kept["second"].decision.kept) == 40
    assert kept["first"].decision.kept.tolist() != kept["second"].decision.kept.tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {"content_hash": "a" * 64},
        {"branch_ids_M": torch.ones(3, dtype=torch.uint8)},
        {"map_hw": (8, 2)},
    ],
    ids=["image", "vision sampler", "map"],
)
def test_another_image_or_sampler_setting_shares_nothing_of_the_image(changes: dict[str, Any]) -> None:
    engine = tiny_llm.engine()
    asked = tiny_llm.request(engine, images=(100,))
    keys = engine.prepare(asked).block_keys
    others = engine.prepare(replace(asked, images=(replace(asked.images[0], **changes),))).block_keys
    first_visual = engine.prepare(asked).prompt.visual_spans[0][0] // 16
    assert len(keys) == len(others) > first_visual + 5
    assert keys[:first_visual] == others[:first_visual]
    assert not set(keys[first_visual:]) & set(others[first_visual:])


@pytest.mark.parametrize("claimed", ["zeros", "one value", "another dtype"])
def test_other_tokens_under_the_same_hash_share_nothing_and_change_nobodys_answer(claimed: str) -> None:
    plain, engine = tiny_llm.engine(prefix_reuse=False), tiny_llm.engine()
    honest = tiny_llm.request(plain, "honest", images=(100,), max_tokens=10)
    tokens_ND = honest.images[0].tokens_ND.clone()
    if claimed == "zeros":
        tokens_ND.zero_()
    elif claimed == "one value":
        tokens_ND[-1, -1] += 1
    else:  # the same bytes
        tokens_ND = tokens_ND.to(torch.bfloat16)
        honest = replace(honest, images=(replace(honest.images[0], tokens_ND=tokens_ND.view(torch.float16).clone()),))
    forged = replace(honest, request_id="forged", images=(replace(honest.images[0], tokens_ND=tokens_ND),))
    expected = ids(plain, [honest])
    keys, others = (engine.prepare(each).block_keys for each in (honest, forged))
    first_visual = engine.prepare(honest).prompt.visual_spans[0][0] // 16
    assert not set(keys[first_visual:]) & set(others[first_visual:])
    ids(engine, [forged])
    before = engine.stats().prompt_tokens_reused
    assert ids(engine, [honest]) == expected
    assert engine.stats().prompt_tokens_reused - before == first_visual * 16


def test_two_images_in_another_order_and_a_system_prompt() -> None:
    engine = tiny_llm.engine()
    asked = tiny_llm.request(engine, images=(50, 50))
    swapped = replace(asked, images=asked.images[::-1])
    first_visual = engine.prepare(asked).prompt.visual_spans[0][0] // 16
    assert not set(engine.prepare(asked).block_keys[first_visual:]) & set(engine.prepare(swapped).block_keys)
    system = PromptTurn(role="system", parts=(TextPart(text="Answer questions about images, briefly, in English."),))
    parts = (ImagePart(image=0), ImagePart(image=1), TextPart(text="What is this?"))
    with_system = replace(asked, turns=(system, PromptTurn(role="user", parts=parts)))
    same_system = replace(swapped, turns=with_system.turns)
    keys, others = (engine.prepare(each).block_keys for each in (with_system, same_system))
    shared = [key for key, other in zip(keys, others, strict=True) if key == other]
    assert len(shared) == engine.prepare(with_system).prompt.visual_spans[0][0] // 16 > 0


def test_the_least_recently_used_prefix_goes_first_and_evicted_ones_are_computed_again() -> None:
    cache = tiny_llm.engine().cache
    engine = tiny_llm.engine(kv_cache_bytes=cache.blocks(450) * cache.block_bytes)
    requests = [tiny_llm.request(engine, f"r{i}", images=(100,), image_seed=i, text_sampler=False) for i in range(5)]
    expected = ids(tiny_llm.engine(prefix_reuse=False), requests)

    def reused(asked: GenerateRequest) -> int:
        before = engine.stats().prompt_tokens_reused
        assert ids(engine, [asked])[asked.request_id] == expected[asked.request_id]
        return engine.stats().prompt_tokens_reused - before

    assert [reused(asked) for asked in requests[:3]] == [0, 0, 0]
    assert reused(requests[0]) > 100, "used again: r1 is now the oldest"
    assert reused(requests[3]) == reused(requests[4]) == 0
    assert reused(requests[4]) > 100
    assert reused(requests[0]) > 0
    assert reused(requests[1]) == 0
