"""Which requests run together, and when."""

from __future__ import annotations

from tests import tiny_llm


def passes(engine, steps: int) -> list[tuple[int, int]]:
    """(prefill passes, decode passes) after each step."""
    result = []
    for _ in range(steps):
        engine.step()
        stats = engine.stats()
        result.append((stats.prefill_passes, stats.decode_passes))
    return result


def test_prompts_share_a_pass_up_to_the_token_budget() -> None:
    engine = tiny_llm.engine(max_batch_tokens=200)
    for index in range(5):
        engine.submit(tiny_llm.request(engine, f"r{index}", images=(60,), max_tokens=50))
    length = engine._sequences["r0"].prompt_len
    engine.step()
    assert engine.stats().running == 200 // length == 2
    assert engine.stats().waiting == 3


def test_a_prompt_over_the_budget_runs_alone() -> None:
    engine = tiny_llm.engine(max_batch_tokens=50)
    engine.submit(tiny_llm.request(engine, "long", images=(100,), max_tokens=3))
    engine.submit(tiny_llm.request(engine, "short", images=(3,), max_tokens=3))
    engine.step()
    assert (engine.stats().running, engine.stats().waiting) == (1, 1)
    assert tiny_llm.run(engine).keys() == {"long", "short"}


def test_a_rush_of_prompts_does_not_stop_running_streams() -> None:
    engine = tiny_llm.engine(max_batch_tokens=100)
    for index in range(4):
        engine.submit(tiny_llm.request(engine, f"r{index}", images=(60,), max_tokens=50))
    assert passes(engine, 6) == [(1, 0), (1, 1), (2, 1), (2, 2), (3, 2), (3, 3)]


def test_first_come_first_served_when_the_pool_is_full() -> None:
    probe = tiny_llm.engine()
    long = tiny_llm.request(probe, "long", images=(200,), prune=False, max_tokens=5)
    pages = probe.cache.pages_needed(probe.prepare(long).max_kv_len)
    engine = tiny_llm.engine(kv_cache_bytes=(pages + 10) * probe.cache.page_bytes)
    engine.submit(tiny_llm.request(engine, "first", images=(60,), max_tokens=5))
    engine.submit(long)
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
