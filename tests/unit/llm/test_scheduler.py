"""What a step computes, and for whom."""

from __future__ import annotations

import pytest

from services.llm.engine import Engine
from services.llm.scheduler import Step
from tests import tiny_llm

K, LAYERS = 2, tiny_llm.LAYERS


def stepping(engine: Engine) -> list[Step]:
    """The list that every step of this engine goes to from now on."""
    steps: list[Step] = []
    extend = engine.scheduler.extend

    def spy(step: Step) -> None:
        extend(step)
        steps.append(step)

    engine.scheduler.extend = spy  # type: ignore[method-assign]
    return steps


def cost(step: Step) -> float:
    """The cost of a step, in tokens through all layers."""
    layers = sum(c.count for c in step.lower) * K + sum(c.count for c in step.upper) * (LAYERS - K)
    return len(step.decode) + layers / LAYERS


def test_a_short_prompt_goes_through_in_one_step() -> None:
    engine = tiny_llm.engine(max_batch_tokens=200)
    engine.submit(tiny_llm.request(engine, images=(60,), max_tokens=50))
    assert len(engine.step()) == 1
    assert len(engine.step()) == 1
    assert (engine.stats().prefill_passes, engine.stats().decode_passes) == (1, 1)


def test_no_step_exceeds_the_budget_and_answers_go_on_in_every_one_of_them() -> None:
    engine = tiny_llm.engine(max_batch_tokens=50, prefix_reuse=False)
    engine.submit(tiny_llm.request(engine, "runs", images=(), max_tokens=60))
    engine.step()
    steps = stepping(engine)
    for index in range(5):
        engine.submit(tiny_llm.request(engine, f"r{index}", images=(300,), image_seed=index, keep_ratio=0.5))
    for _ in range(30):
        assert "runs" in [request_id for request_id, _ in engine.step()]
    assert all(cost(step) <= 50 for step in steps)
    busy = [step for step in steps if step.lower or step.upper]
    assert sum(cost(step) for step in busy[:-1]) > 0.9 * 50 * len(busy[:-1]), "nor is much of it left unused"
    tiny_llm.run(engine)


def test_prefill_is_split_by_tokens_and_by_layers_in_order() -> None:
    engine = tiny_llm.engine(max_batch_tokens=40)
    engine.submit(tiny_llm.request(engine, images=(300,), keep_ratio=0.25, max_tokens=2))
    sequence = engine._sequences["r"]
    steps = stepping(engine)
    tiny_llm.run(engine)
    lower = [chunk for step in steps for chunk in step.lower]
    upper = [chunk for step in steps for chunk in step.upper]
    for chunks, length in ((lower, sequence.prompt_len), (upper, sequence.prompt_len - 225)):
        assert len(chunks) > 1
        assert [chunk.start for chunk in chunks[1:]] == [chunk.start + chunk.count for chunk in chunks[:-1]]
        assert chunks[0].start == 0 and chunks[-1].start + chunks[-1].count == length
    assert max(i for i, step in enumerate(steps) if step.lower) <= min(i for i, step in enumerate(steps) if step.upper)
    selecting = [step for step in steps if step.selecting]
    assert len(selecting) == 1 and selecting[0].lower[-1] is lower[-1]


def test_an_older_prompt_comes_first() -> None:
    engine = tiny_llm.engine(max_batch_tokens=50)
    for name in ("first", "second", "third"):
        engine.submit(tiny_llm.request(engine, name, images=(120,), image_seed=ord(name[0]), max_tokens=30))
    began: list[str] = []
    while engine.has_work():
        began += [request_id for request_id, _ in engine.step() if request_id not in began]
    assert began == ["first", "second", "third"]


def test_several_short_prompts_share_a_step() -> None:
    engine = tiny_llm.engine(max_batch_tokens=200, prefix_reuse=False)
    for index in range(5):
        engine.submit(tiny_llm.request(engine, f"r{index}", images=(60,), text_sampler=False, max_tokens=50))
    length = engine._sequences["r0"].prompt_len
    steps = stepping(engine)
    assert len(engine.step()) == 200 // length == 2
    assert engine.stats().running == 3, "the third has begun with what was left"
    assert cost(steps[0]) <= 200


def test_a_budget_smaller_than_what_decodes_still_lets_prompts_in() -> None:
    engine = tiny_llm.engine(max_batch_tokens=1, max_running=8)
    requests = [tiny_llm.request(engine, f"r{i}", images=(20,), image_seed=i, max_tokens=30) for i in range(8)]
    assert len(tiny_llm.run(engine, requests)) == 8


def test_first_come_first_served_when_the_pool_is_full() -> None:
    cache = tiny_llm.engine().cache
    engine = tiny_llm.engine(kv_cache_bytes=cache.blocks(280) * cache.block_bytes, prefix_reuse=False)
    engine.submit(tiny_llm.request(engine, "first", images=(60,), max_tokens=5))
    engine.submit(tiny_llm.request(engine, "long", images=(200,), text_sampler=False, max_tokens=5))
    engine.submit(tiny_llm.request(engine, "small", images=(), max_tokens=1))
    order = []
    while engine.has_work():
        order += [request_id for request_id, event in engine.step() if hasattr(event, "reason")]
        engine.check_integrity()
    assert order.index("first") < order.index("small"), "a small request does not overtake the one that waits for room"
    assert set(order) == {"first", "long", "small"}


def test_no_more_run_than_allowed() -> None:
    engine = tiny_llm.engine(max_running=3)
    for index in range(7):
        engine.submit(tiny_llm.request(engine, f"r{index}", images=(5,), max_tokens=4))
    most = 0
    while engine.has_work():
        engine.step()
        most = max(most, engine.stats().running)
    assert most == 3


def test_the_prefill_that_is_left_shrinks_by_what_each_step_computes() -> None:
    engine = tiny_llm.engine(max_batch_tokens=50, prefix_reuse=False)
    for index in range(3):
        engine.submit(
            tiny_llm.request(engine, f"r{index}", images=(120,), image_seed=index, keep_ratio=0.5, max_tokens=9)
        )
    # What leaves before the upper layers is known from the ratio.
    prompt, leaves = engine._sequences["r0"].prompt_len, 60
    left = engine.stats().prefill_tokens_left
    assert left == pytest.approx(3 * (prompt - leaves * (LAYERS - K) / LAYERS))
    steps = stepping(engine)
    while engine.has_work():
        steps.clear()  # a step without prefill is not told
        engine.step()
        left -= sum(cost(step) - len(step.decode) for step in steps)
        assert engine.stats().prefill_tokens_left == pytest.approx(left)
    assert left == pytest.approx(0)


def test_the_pages_that_are_wanted_are_those_held_and_those_of_waiting_prompts() -> None:
    engine = tiny_llm.engine(max_running=1, prefix_reuse=False)
    for name in ("runs", "waits", "waits-too"):
        engine.submit(tiny_llm.request(engine, name, images=(60,), keep_ratio=0.5, max_tokens=4))
    waiting = engine._sequences["waits"]
    pages = engine.cache.pages_needed(waiting.prompt_len, waiting.prompt_len - 30)
    assert engine.stats().kv_pages_wanted == 3 * pages
    engine.step()
    stats = engine.stats()
    assert stats.kv_pages_wanted == stats.kv_pages_used + 2 * pages
    tiny_llm.run(engine)
    assert engine.stats().kv_pages_wanted == 0
