"""A batch changes nobody's answer, nor does the way a prompt is split, a preemption, or what others computed before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from services.common.types import FinishedEvent, GenerateRequest, SamplerSettings, SamplingParams
from services.llm.engine import Engine
from tests import tiny_llm
from tests.tiny_checkpoints import FAMILIES

Answers = dict[str, tuple[list[int], str, FinishedEvent]]


def alone(family: str, requests: Sequence[GenerateRequest]) -> Answers:
    """Answers of engines that run one request each, its prompt in one piece."""
    plain = tiny_llm.engine(family, prefix_reuse=False)
    answers: Answers = {}
    for asked in requests:
        plain.submit(asked)
        events = []
        while plain.has_work():
            events += plain.step()
        answers.update(tiny_llm.collect(events))
        assert plain.cache.pool.free_pages == plain.cache.num_pages
    plain.check_integrity()
    assert plain.stats().prefill_passes == len(requests)
    return answers


def arriving(engine: Engine, requests: Sequence[GenerateRequest]) -> Answers:
    """Answers to requests of which some arrive together, some while others run."""
    events: list[tuple[str, Any]] = []
    waiting, step = list(requests), 0
    while waiting or engine.has_work():
        for _ in range(min(len(waiting), (3, 0, 1, 0, 0, 4)[step % 6])):
            engine.submit(waiting.pop(0))
        events += engine.step()
        engine.check_integrity()
        step += 1
    return tiny_llm.collect(events)


def assert_equal(actual: Answers, expected: Answers) -> None:
    assert actual.keys() == expected.keys()
    for request_id, (ids, text, end) in expected.items():
        assert actual[request_id][:2] == (ids, text), request_id
        other = actual[request_id][2]
        assert other.reason == end.reason
        for name in ("prompt_tokens", "completion_tokens", "visual_tokens_kept", "kv_bytes", "kv_unpruned_bytes"):
            assert getattr(other.usage, name) == getattr(end.usage, name), (request_id, name)


def pool_for(tokens: int) -> int:
    """Bytes of KV cache for so many tokens through all layers."""
    cache = tiny_llm.engine().cache
    return cache.blocks(tokens) * cache.block_bytes


def test_200_mixed_requests_equal_alone_under_chunks_preemption_and_prefix_reuse() -> None:
    engine = tiny_llm.engine(max_batch_tokens=100, max_running=40, kv_cache_bytes=pool_for(1000))
    requests = tiny_llm.mixed_requests(engine, 200)
    expected = alone("llama", requests)
    assert_equal(arriving(engine, requests), expected)
    stats = engine.stats()
    assert stats.preemptions > 20
    assert stats.prompt_tokens_reused > 1000
    assert stats.prefill_passes > 100
    assert len({tuple(ids) for ids, _, _ in expected.values()}) > 100, "they must differ for this to mean anything"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("budget", "tokens", "prefix_reuse"),
    [(4096, 4000, False), (40, 4000, False), (4096, 4000, True), (200, 330, False)],
    ids=["whole", "chunked", "reused", "preempted"],
)
def test_batched_equals_alone(family: str, budget: int, tokens: int, prefix_reuse: bool) -> None:
    torch.set_num_threads(2 if family == "llama" else 1)
    engine = tiny_llm.engine(
        family, max_batch_tokens=budget, max_running=9, kv_cache_bytes=pool_for(tokens), prefix_reuse=prefix_reuse
    )
    requests = tiny_llm.mixed_requests(engine, 24)
    assert_equal(arriving(engine, requests), alone(family, requests))
    stats = engine.stats()
    assert (stats.preemptions > 0) == (tokens == 330)
    assert (stats.prompt_tokens_reused > 0) == prefix_reuse


def decisions(engine: Engine, requests: Sequence[GenerateRequest]) -> dict[str, Any]:
    for asked in requests:
        engine.submit(asked)
    sequences = dict(engine._sequences)
    tiny_llm.run(engine)
    return {name: sequence.decision for name, sequence in sequences.items()}


def test_a_split_prompt_makes_the_same_decision() -> None:
    whole, split = tiny_llm.engine(max_batch_tokens=4096), tiny_llm.engine(max_batch_tokens=17, max_running=1)
    requests = [
        tiny_llm.request(whole, f"r{i}", images=(150, 33), image_seed=i, threshold=t, keep_ratio=r, max_tokens=2)
        for i, (t, r) in enumerate([(0.3, None), (0.85, None), (None, 0.25), (0.99, None), (None, 0.501)])
    ]
    expected, actual = decisions(whole, requests), decisions(split, requests)
    assert split.stats().prefill_passes > 40
    for name, decision in expected.items():
        torch.testing.assert_close(actual[name].importance, decision.importance)
        assert actual[name].kept.tolist() == decision.kept.tolist()
        assert 0 < len(decision.kept) < 183
    assert len(expected["r2"].kept) == 46 and len(expected["r4"].kept) == 92  # ceil(0.25 * 183), ceil(0.501 * 183)
    assert (expected["r2"].threshold, expected["r2"].keep_ratio) == (None, 0.25)
    order = expected["r2"].importance.argsort(descending=True)[:46]
    assert sorted(order.tolist()) == expected["r2"].kept.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_threshold_one_and_ratio_one_equal_off(family: str) -> None:
    engine = tiny_llm.engine(family)
    settings: tuple[dict[str, Any], ...] = ({"threshold": 1.0}, {"keep_ratio": 1.0}, {"text_sampler": False})
    full, ratio, off = (
        tiny_llm.run(engine, [tiny_llm.request(engine, max_tokens=24, **setting)])["r"] for setting in settings
    )
    assert full[0] == ratio[0] == off[0]
    for _, _, end in (full, ratio, off):
        assert end.usage.visual_tokens_kept == end.usage.visual_tokens_sampled == 40
        assert end.usage.kv_bytes == end.usage.kv_unpruned_bytes
        assert end.usage.prune_layer == 0


def test_seed_decides_whatever_the_batch_and_no_seed_varies() -> None:
    engine = tiny_llm.engine()

    def asked(name: str, seed: int | None) -> GenerateRequest:
        return tiny_llm.request(engine, name, temperature=1.0, max_tokens=16, seed=seed)

    seeded = [asked(f"s{i}", 5) for i in range(3)]
    results = tiny_llm.run(engine, [*seeded, *(asked(f"f{i}", None) for i in range(3)), asked("o", 6)])
    by_itself = tiny_llm.run(engine, seeded[:1])["s0"][0]
    assert by_itself == results["s0"][0] == results["s1"][0] == results["s2"][0]
    assert results["o"][0] != by_itself
    assert len({tuple(results[f"f{i}"][0]) for i in range(3)}) == 3


def test_penalties_and_logprobs_see_the_same_prompt_and_answer_after_a_preemption() -> None:
    settings = SamplingParams(
        max_tokens=30, ignore_eos=True, repetition_penalty=1.4, frequency_penalty=0.3, presence_penalty=0.2, logprobs=2
    )
    plain = tiny_llm.engine(prefix_reuse=False)
    requests = [
        GenerateRequest(
            **{
                **vars(tiny_llm.request(plain, f"r{i}", images=(60,), image_seed=i)),
                "sampling": settings,
                "samplers": SamplerSettings(keep_ratio=0.5),
            }
        )
        for i in range(6)
    ]
    tight = tiny_llm.engine(kv_cache_bytes=pool_for(300))

    def answers(engine: Engine) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for asked in requests:
            engine.submit(asked)
        while engine.has_work():
            for request_id, event in engine.step():
                if not isinstance(event, FinishedEvent):
                    found.setdefault(request_id, []).append(event)
        return found

    expected, actual = answers(plain), answers(tight)
    assert tight.stats().preemptions > 0
    for request_id, events in expected.items():
        assert [e.token_ids for e in actual[request_id]] == [e.token_ids for e in events]
        for mine, theirs in zip(actual[request_id], events, strict=True):
            assert len(mine.logprobs) == 1 and len(mine.logprobs[0].top) == 2
            assert mine.logprobs[0].chosen.logprob == pytest.approx(theirs.logprobs[0].chosen.logprob, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_in_one_call_decodes_what_its_operators_do(family: str, dtype: torch.dtype):
    folder = tiny_llm.checkpoint(family)
    whole, parts = (tiny_llm.engine(folder=folder, dtype=dtype) for _ in range(2))
    if not whole.decoder.decodes_whole:
        pytest.skip("this processor has no panels for this dtype")
    parts.decoder.decodes_whole = False
    first, second = (
        {
            request_id: [event.logprobs for name, event in events if name == request_id and hasattr(event, "logprobs")]
            for request_id in ("a", "b", "c")
        }
        for events in (_events(target) for target in (whole, parts))
    )
    assert first == second and all(len(each) > 1 for each in first.values())


def _events(target: Engine) -> list[tuple[str, Any]]:
    for request_id, images in (("a", (40,)), ("b", ()), ("c", (25, 31))):
        target.submit(tiny_llm.request(target, request_id, images=images, keep_ratio=0.5, logprobs=3, max_tokens=12))
    events: list[tuple[str, Any]] = []
    while target.has_work():
        events += target.step()
    target.check_integrity()
    return events
