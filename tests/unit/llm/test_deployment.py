"""A replica of stage 2 outside of Ray: what it reports, and when it says that it is unwell."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from services.common.telemetry import Metrics
from services.compute import replica
from services.llm import deployment
from services.llm.deployment import LanguageModel, LanguageModelSettings
from tests import tiny_llm

Told = list[tuple[str, float]]


@contextlib.asynccontextmanager
async def started(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[LanguageModel, Told]]:
    """A replica, and the gauges that it told its metrics."""
    told: Told = []

    class Counting(Metrics):
        def set(self, name: str, value: float, **tags: str) -> None:
            super().set(name, value, **tags)
            told.append((name, value))

    monkeypatch.setattr(deployment, "set_up_logs", lambda environment: None)
    monkeypatch.setattr(replica, "keep_freed_memory", lambda: None)  # it would last as long as this process
    monkeypatch.setattr(deployment, "Metrics", lambda stage, backend: Counting(stage))
    settings = LanguageModelSettings(
        checkpoint=str(tiny_llm.checkpoint()), device="cpu", dtype="float32", stall_s=0, kv_cache_bytes=2**24
    )
    model = LanguageModel.func_or_class(settings)  # type: ignore[attr-defined]
    model._reporter._task.cancel()
    try:
        yield model, told
    finally:
        model._engine.close()


async def test_failing_steps_or_a_dead_thread_have_the_replica_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    async with started(monkeypatch) as (model, _):
        model._reporter.check = lambda: None
        model._stall_s = 60
        model.check_health()
        with tiny_llm.broken_layer(0, "an illegal memory access was encountered"):
            for _ in range(4):
                with pytest.raises(Exception, match="failed on this request"):
                    _ = [event async for event in model._engine.generate(tiny_llm.request(model._model))]
                model._report()
        with pytest.raises(RuntimeError, match="4 steps failed"):
            model.check_health()
        _ = [event async for event in model._engine.generate(tiny_llm.request(model._model))]
        model.check_health()
        model._engine.close()
        with pytest.raises(RuntimeError, match="thread has ended"):
            model.check_health()


@pytest.mark.parametrize(("state", "stalls"), [({}, False), ({"running": 1}, True), ({"waiting": 1}, True)])
async def test_no_pass_while_requests_run_or_wait_is_a_stall(
    state: dict[str, int], stalls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started(monkeypatch) as (model, _):
        model._reporter.check = lambda: None
        model._stall_s = 60
        model._progress = (0, model._progress[1] - 61)
        stats = replace(model._engine.stats(), **state)
        monkeypatch.setattr(model._engine, "stats", lambda: stats)
        model._report()
        with pytest.raises(RuntimeError, match="no pass has ended") if stalls else contextlib.nullcontext():
            model.check_health()


async def test_totals_are_told_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    async with started(monkeypatch) as (model, told):
        totals = {"preemptions": 2, "prompt_tokens_reused": 130}
        for changes in ({}, totals):
            stats = replace(model._engine.stats(), **changes)
            monkeypatch.setattr(model._engine, "stats", lambda stats=stats: stats)
            model._report()
        for name, total in totals.items():
            assert [value for each, value in told if each == f"focusllava_{name}"] == [0, total]
