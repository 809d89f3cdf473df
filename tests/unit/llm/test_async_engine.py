"""The engine's thread as asyncio sees it: streams, cancellation, faults, shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.common.errors import InternalError, InvalidInput, StageUnavailable
from services.common.types import Constraint, FinishedEvent, GenerateRequest
from services.llm.async_engine import INTAKE_THREADS, AsyncEngine
from services.llm.block_pool import Block
from services.llm.kv_cache import BlockTables
from tests import tiny_llm

TIMEOUT_S = 60


@contextlib.asynccontextmanager
async def running(**options) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(tiny_llm.engine(**options))
    try:
        async with asyncio.timeout(TIMEOUT_S):
            yield engine
    finally:
        engine.close()
        engine.engine.check_integrity()
        assert engine.engine.stats().kv_pages_used == 0


async def answer(engine: AsyncEngine, request: GenerateRequest) -> tuple[list[int], FinishedEvent]:
    events = [event async for event in engine.generate(request)]
    return [t for event in events[:-1] for t in event.token_ids], events[-1]


async def until_idle(engine: AsyncEngine) -> None:
    while engine.stats().running or engine.stats().waiting:
        await asyncio.sleep(0.005)


async def test_concurrent_streams_equal_the_engine_alone() -> None:
    plain = tiny_llm.engine()
    requests = [tiny_llm.request(plain, f"r{i}", images=(10 + i,), image_seed=i, max_tokens=5 + i) for i in range(8)]
    expected = {r: ids for r, (ids, _, _) in tiny_llm.run(plain, requests).items()}
    async with running() as engine:
        results = await asyncio.gather(*(answer(engine, request) for request in requests))
    assert {f"r{i}": ids for i, (ids, _) in enumerate(results)} == expected
    assert all(end.reason == "length" for _, end in results)


async def test_tokens_come_as_they_are_made_and_not_at_the_end() -> None:
    async with running() as engine:
        request = tiny_llm.request(engine.engine, max_tokens=1500, text_sampler=False)
        async with contextlib.aclosing(engine.generate(request)) as events:
            await anext(events)
            await anext(events)
            assert engine.stats().running == 1


async def test_closing_or_cancelling_frees_the_request() -> None:
    async with running() as engine:
        request = tiny_llm.request(engine.engine, max_tokens=1500)
        async with contextlib.aclosing(engine.generate(request)) as events:
            await anext(events)
        await until_idle(engine)

        task = asyncio.create_task(answer(engine, request))
        while not engine.stats().running:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until_idle(engine)
        assert engine.stats().kv_pages_used == 0
        # The id is free again.
        assert (await answer(engine, tiny_llm.request(engine.engine, max_tokens=3)))[1].usage.completion_tokens == 3


async def test_a_request_that_waits_can_be_cancelled() -> None:
    async with running(max_running=1) as engine:
        first = asyncio.create_task(answer(engine, tiny_llm.request(engine.engine, "first", max_tokens=300)))
        while not engine.stats().running:
            await asyncio.sleep(0.005)
        second = asyncio.create_task(answer(engine, tiny_llm.request(engine.engine, "second")))
        while not engine.stats().waiting:
            await asyncio.sleep(0.005)
        second.cancel()
        ids, _ = await first
        assert len(ids) == 300
        assert second.cancelled() or second.done()


async def test_requests_cancelled_before_their_intake_are_never_read(monkeypatch) -> None:
    """Three hundred wait behind a slow one: the threads of the intake are few."""
    async with running() as engine:
        read: list[str] = []
        slow = threading.Event()
        prepare = engine.engine.prepare

        def slowly(request: GenerateRequest) -> Any:
            read.append(request.request_id)
            slow.wait(20)
            return prepare(request)

        monkeypatch.setattr(engine.engine, "prepare", slowly)
        requests = [tiny_llm.request(engine.engine, f"r{i}", max_tokens=1000) for i in range(300)]
        tasks = [asyncio.create_task(answer(engine, request)) for request in requests]
        while len(read) < INTAKE_THREADS:
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        slow.set()
        await engine.take_in(lambda: None)
        await until_idle(engine)
        assert len(read) == INTAKE_THREADS and engine.stats().decode_passes == 0


async def test_a_refused_request_raises_before_any_event_and_a_duplicate_leaves_the_first_alone() -> None:
    async with running() as engine:
        with pytest.raises(InvalidInput, match="prune.threshold"):
            await answer(engine, tiny_llm.request(engine.engine, threshold=2.0))
        request = tiny_llm.request(engine.engine, max_tokens=60)
        first = asyncio.create_task(answer(engine, request))
        while not engine.stats().running:
            await asyncio.sleep(0.001)
        with pytest.raises(InvalidInput, match="in flight"):
            await answer(engine, request)
        assert len((await first)[0]) == 60


async def test_a_failed_pass_is_an_internal_error_for_its_requests_and_the_engine_lives_on() -> None:
    async with running() as engine:
        good = tiny_llm.request(engine.engine, max_tokens=6)
        expected, _ = await answer(engine, good)

        with tiny_llm.broken_layer(3, "secret detail /some/path"):
            results = await asyncio.gather(
                *(answer(engine, tiny_llm.request(engine.engine, f"r{i}")) for i in range(3)), return_exceptions=True
            )
        assert [type(result).__mro__[1] for result in results] == [InternalError] * 3
        assert not any("secret" in str(result) for result in results)
        assert (await answer(engine, good))[0] == expected


async def outcomes(engine: AsyncEngine, *requests: GenerateRequest) -> list[type]:
    results = await asyncio.gather(*(answer(engine, request) for request in requests), return_exceptions=True)
    return [type(result) for result in results]


def refuse_memory(*arguments: Any, **options: Any) -> None:
    raise MemoryError("secret detail")


async def test_an_engine_whose_every_step_fails_is_unwell_until_a_request_ends_well() -> None:
    async with running() as engine:
        engine.check()
        request = tiny_llm.request(engine.engine, max_tokens=3)
        with tiny_llm.broken_layer(0, "an illegal memory access was encountered"):
            for _ in range(3):
                await outcomes(engine, request)
            engine.check()
            await outcomes(engine, request)
            with pytest.raises(RuntimeError, match="4 steps failed"):
                engine.check()
        await answer(engine, request)
        engine.check()


async def test_a_step_that_could_not_be_planned_leaves_no_block_that_holds_nothing(monkeypatch) -> None:
    async with running() as engine:
        first, later = (tiny_llm.request(engine.engine, name, images=(60,), text_sampler=False) for name in ("a", "c"))
        expected = tiny_llm.run(tiny_llm.engine(), [first])["a"][0]
        cache, calls = engine.engine.cache, 0
        append = cache._append

        def fail(table: BlockTables, group: int, blocks: list[Block]) -> None:
            nonlocal calls
            calls += 1
            if calls == 3:  # adopt and grow of the first, whose blocks have keys by now
                table.blocks[group].extend(blocks)
                raise RuntimeError("out of memory")
            append(table, group, blocks)

        with monkeypatch.context() as patch:
            patch.setattr(cache, "_append", fail)
            both = threading.Event()
            engine._inbox.put(both.wait)
            other = tiny_llm.request(engine.engine, "b", images=(70,), image_seed=5, text_sampler=False)
            asked = asyncio.create_task(outcomes(engine, first, other))
            while engine._inbox.qsize() < 2:
                await asyncio.sleep(0.005)
            both.set()
            assert await asked == [InternalError] * 2
        assert calls == 3 and engine.stats().failed_steps == 1
        assert engine.stats().kv_pages_cached == 0
        assert (await answer(engine, later))[0] == expected


@pytest.mark.parametrize("method", ["enqueue", "cache.open", "scheduler.schedule", "cache.free"])
async def test_whatever_fails_everyone_is_answered_and_the_thread_lives(method: str, monkeypatch) -> None:
    async with running() as engine:
        request = tiny_llm.request(engine.engine, max_tokens=3)
        expected, _ = await answer(engine, request)
        owner: Any = engine.engine
        *path, name = method.split(".")
        for part in path:
            owner = getattr(owner, part)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse_memory)
            results = await asyncio.gather(answer(engine, request), return_exceptions=True)
            assert isinstance(results[0], InternalError) and "secret" not in str(results[0])
            await until_idle(engine)
        engine.check()
        engine.engine.cache.free(request.request_id)  # where that is what failed, the table is still there
        assert (await answer(engine, request))[0] == expected


async def test_an_engine_whose_thread_is_gone_is_unwell() -> None:
    engine = AsyncEngine(tiny_llm.engine())
    engine.check()
    engine.close()
    with pytest.raises(RuntimeError, match="thread has ended"):
        engine.check()


async def test_close_ends_streams_joins_and_refuses_what_comes_later() -> None:
    engine = AsyncEngine(tiny_llm.engine(max_running=1))
    requests = [tiny_llm.request(engine.engine, f"r{i}", max_tokens=1500) for i in range(2)]
    tasks = [asyncio.create_task(answer(engine, request)) for request in requests]
    while not (engine.stats().running and engine.stats().waiting):
        await asyncio.sleep(0.005)
    await asyncio.to_thread(engine.close)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [StageUnavailable] * 2
    assert not engine._thread.is_alive()
    engine.engine.check_integrity()
    constrained = tiny_llm.request(engine.engine, constraint=Constraint(kind="regex", text="a+"))
    for late in (requests[0], constrained):
        with pytest.raises(StageUnavailable):
            await answer(engine, late)


async def test_close_ends_what_waits_to_be_compiled(monkeypatch) -> None:
    """One constraint is being compiled, another waits for the thread, and a third has been cancelled by its caller."""
    engine = AsyncEngine(tiny_llm.engine())
    grammars = engine.engine.grammars
    compiling, goes_on, compile_ = threading.Event(), threading.Event(), grammars._compile

    def slowly(constraint: Constraint) -> Any:
        compiling.set()
        goes_on.wait(20)
        return compile_(constraint)

    monkeypatch.setattr(grammars, "_compile", slowly)
    constraints = [Constraint(kind="regex", text=letter) for letter in "abc"]
    requests = [tiny_llm.request(engine.engine, c.text, max_tokens=5, constraint=c) for c in constraints]
    first, second, third = (asyncio.create_task(answer(engine, request)) for request in requests)
    await asyncio.to_thread(compiling.wait, 20)
    third.cancel()
    closing = asyncio.create_task(asyncio.to_thread(engine.close))
    with pytest.raises(StageUnavailable):
        await asyncio.wait_for(second, 20)
    goes_on.set()
    await closing
    with pytest.raises(StageUnavailable):
        await first
    with pytest.raises(asyncio.CancelledError):
        await third


async def test_cancel_storm() -> None:
    async with running(max_running=4) as engine:

        async def impatient(index: int) -> int:
            request = tiny_llm.request(engine.engine, f"r{index}", images=(index % 30 + 1,), max_tokens=40)
            count = 0
            async with contextlib.aclosing(engine.generate(request)) as events:
                async for event in events:
                    count += len(event.token_ids)
                    if count > index % 7:
                        break
            return count

        counts = await asyncio.gather(*(impatient(index) for index in range(60)))
        assert all(count > index % 7 for index, count in enumerate(counts))  # a slow reader gets several at once
        await until_idle(engine)


async def test_a_constraint_that_takes_long_to_compile_holds_nobody_up() -> None:
    async with running() as engine:
        hours = Constraint(kind="json_schema", text='{"type": "integer", "multipleOf": 9999991}')
        quick = Constraint(kind="regex", text="[ab]+")
        compiled = tiny_llm.request(engine.engine, "compiled", max_tokens=9, constraint=quick)
        await answer(engine, compiled)
        slow = asyncio.create_task(answer(engine, tiny_llm.request(engine.engine, "slow", constraint=hours)))
        await asyncio.sleep(0.05)
        free = [answer(engine, tiny_llm.request(engine.engine, f"r{i}")) for i in range(4)]
        ends = [end for _, end in await asyncio.gather(*free, answer(engine, compiled))]
        assert not slow.done() and all(end.reason in ("stop", "length") for end in ends)
        with pytest.raises(InvalidInput, match="json_schema: cannot be compiled: takes more than 2 s"):
            await slow
        with pytest.raises(InvalidInput, match="takes more than 2 s"):  # and now it is known
            await answer(engine, tiny_llm.request(engine.engine, "again", constraint=hours))
