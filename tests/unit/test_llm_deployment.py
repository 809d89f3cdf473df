"""A replica of stage 2 outside of Ray: what it reports, and when it says that it is unwell."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from services.common import replica
from services.common.telemetry import Metrics
from services.llm import deployment
from services.llm.deployment import LanguageModel, LanguageModelSettings
from tests import tiny_llm

Told = list[tuple[str, float]]


@contextlib.asynccontextmanager
async def started(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[LanguageModel, Told]]:
    """A replica, and the counts that it told its metrics."""
    told: Told = []

    class Counting(Metrics):
        def count(self, name: str, amount: float = 1, **tags: str) -> None:
            super().count(name, amount, **tags)
            told.append((name, amount))

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


async def test_totals_become_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    async with started(monkeypatch) as (model, told):
        stats = model._engine.stats()
        for preemptions, reused in ((2, 100), (2, 130), (5, 130)):
            changed = replace(stats, preemptions=preemptions, prompt_tokens_reused=reused)
            monkeypatch.setattr(model._engine, "stats", lambda changed=changed: changed)
            model._report()
        for name, amounts in (("preemptions", [2, 0, 3]), ("prompt_tokens_reused", [100, 30, 0])):
            assert [amount for each, amount in told if each == f"focusllava_{name}"] == amounts
