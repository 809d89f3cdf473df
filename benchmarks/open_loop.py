"""Requests that come when they come, however many are under way: arrival times, what became of each, goodput.

A closed loop waits for a slow server and so never shows what its users feel; an open one does not. Times count from the
moment when a request was due, so a generator that falls behind hides nothing either.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from benchmarks.measure import percentile
from benchmarks.questions import Question
from focusllava.connection import CHANNEL_OPTIONS, fixed_metadata
from focusllava.errors import FocusClientError, retry_after_s
from focusllava.messages import user
from focusllava.v1 import focus_pb2_grpc
from focusllava.wire import AnswerState, build_request

REFUSED = "RESOURCE_EXHAUSTED"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A way to a server, and what each request to it sets beside its own."""

    address: str
    application: str = "gateway"
    api_key: str | None = None
    settings: Mapping[str, Any] | None = None
    """Settings of a request, as `focusllava.messages.Settings` has them, and `map_share` of its image."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What an answer must keep to be counted as goodput, in seconds."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one request; times in seconds from the moment when it was due."""

    lag_s: float
    """How much later than due it was sent."""
    code: str = "OK"
    """A gRPC status by name."""
    message: str = ""
    retry_after_s: float | None = None
    """When a refusal says to come back; None where it does not."""
    token_times: tuple[float, ...] = ()
    cached: tuple[bool, ...] = ()
    """For each image, whether its visual tokens were in the gateway's cache."""
    right: bool | None = None
    visual_tokens: int = 0
    """Visual tokens that the vision-guided sampler left."""
    level: int = 0
    """The level of load compression."""

    @property
    def ttft_s(self) -> float:
        return self.token_times[0] if self.token_times else math.nan

    @property
    def tpot_s(self) -> float:
        """Mean time of each token after the first; 0 for an answer of one."""
        tokens = len(self.token_times)
        return (self.token_times[-1] - self.token_times[0]) / (tokens - 1) if tokens > 1 else 0.0

    def meets(self, goal: Goal) -> bool:
        return self.code == "OK" and self.ttft_s <= goal.ttft_s and self.tpot_s <= goal.tpot_s


def poisson_times(rate: float, seconds: float, seed: int) -> list[float]:
    """Moments from 0 to `seconds` at which requests arrive independently, `rate` a second on average."""
    return burst_times(rate, seconds, 1, seed)


def burst_times(rate: float, seconds: float, burst: int, seed: int) -> list[float]:
    """The moments of `poisson_times`, `burst` times rarer, with so many requests at each."""
    rng, at, times = random.Random(seed), 0.0, list[float]()
    while (at := at + rng.expovariate(rate / burst)) < seconds:
        times += [at] * burst
    return times


class Client:
    """Asks one target, in one event loop."""

    def __init__(self, target: Target, timeout_s: float):
        self._target, self._timeout_s = target, timeout_s
        self._metadata = fixed_metadata(target.application, target.api_key)
        self._channel = grpc.aio.insecure_channel(target.address, options=CHANNEL_OPTIONS)
        self._stub: Any = focus_pb2_grpc.FocusServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        await self._channel.close()

    async def ask(self, question: Question, due: float | None = None) -> Outcome:
        """Never raises for what the server does. due: a moment of time.perf_counter; None is now."""
        settings: dict[str, Any] = {**question.settings, **(self._target.settings or {})}
        turn = user(question.text, images=question.image, map_share=settings.pop("map_share", None))
        request = build_request([turn], **settings)
        sent = time.perf_counter()
        due = sent if due is None else due
        state, times = AnswerState(), list[float]()
        try:
            async for event in self._stub.Chat(request, metadata=self._metadata, timeout=self._timeout_s):
                state.take(event)
                if event.HasField("token"):
                    times += [time.perf_counter() - due] * len(event.token.token_ids)
            answer = state.answer()
        except grpc.RpcError as error:
            return Outcome(
                lag_s=sent - due,
                code=error.code().name,
                message=error.details() or "",
                retry_after_s=retry_after_s(error),
            )
        except FocusClientError as error:  # inside the stream
            return Outcome(lag_s=sent - due, code=error.code, message=error.message)
        return Outcome(
            lag_s=sent - due,
            token_times=tuple(times),
            cached=tuple(image.cached for image in answer.images),
            right=question.is_right(answer.text),
            visual_tokens=answer.usage.visual_tokens_sampled,
            level=answer.usage.compression_level,
        )

    async def open_loop(self, questions: Sequence[Question], times: Sequence[float]) -> list[Outcome]:
        """Asks each question at its moment, in seconds from now. Returns when all have ended."""
        began = time.perf_counter()

        async def at(moment: float, question: Question) -> Outcome:
            await asyncio.sleep(max(0.0, began + moment - time.perf_counter()))
            return await self.ask(question, began + moment)

        return list(await asyncio.gather(*map(at, times, questions)))

    async def closed_loop(self, questions: Sequence[Question], concurrency: int) -> tuple[float, list[Outcome]]:
        """Keeps so many in flight until all are answered. Returns seconds in all, too."""
        left, outcomes, began = list(reversed(questions)), list[Outcome](), time.perf_counter()

        async def one_after_the_other() -> None:
            while left:
                outcomes.append(await self.ask(left.pop()))

        await asyncio.gather(*(one_after_the_other() for _ in range(concurrency)))
        return time.perf_counter() - began, outcomes


def summary(
    outcomes: Sequence[Outcome], seconds: float, goal: Goal, until_last_s: float | None = None
) -> dict[str, float]:
    """The figures of one turn, in which requests arrived for so many seconds. NaN where there is nothing to tell.

    Shares are in per cent; "score" is of the answers, "good_score" of those that met the goal. until_last_s: seconds to
    the end of the last answer, which "answered_per_s" is over; the arrivals' seconds when left out.
    """
    answered = [each for each in outcomes if each.code == "OK"]
    good = [each for each in answered if each.meets(goal)]
    images = [cached for each in answered for cached in each.cached]
    ttft, tpot = [each.ttft_s for each in answered], [each.tpot_s for each in answered]
    return {
        "requests": len(outcomes),
        "offered_per_s": len(outcomes) / seconds,
        "answered_per_s": len(answered) / (until_last_s or seconds),
        "goodput_per_s": len(good) / seconds,
        "refused": sum(each.code == REFUSED for each in outcomes),
        "failed": sum(each.code not in ("OK", REFUSED) for each in outcomes),
        "ttft_p50_ms": 1e3 * percentile(ttft, 0.5),
        "ttft_p99_ms": 1e3 * percentile(ttft, 0.99),
        "tpot_p50_ms": 1e3 * percentile(tpot, 0.5),
        "tpot_p99_ms": 1e3 * percentile(tpot, 0.99),
        "score": _percent([each.right for each in answered if each.right is not None]),
        "good_score": _percent([each.right for each in good if each.right is not None]),
        "cache_hits": _percent(images),
        "visual_tokens": _mean([each.visual_tokens for each in answered]),
        "level": _mean([each.level for each in answered]),
        "lag_p99_ms": 1e3 * percentile([each.lag_s for each in outcomes], 0.99),
    }


def _percent(found: Sequence[bool]) -> float:
    return 100 * _mean(found)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
