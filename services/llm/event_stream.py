"""One answer's events on their way from the engine's thread to an event loop, tokens gathered under load.

Each message of a stream costs the stage, the gateway and Ray's proxy some tenths of a millisecond of processor time,
whatever it holds. So where many answers run, an answer's tokens wait for those after them; the first never waits, and
where one answer runs none does.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from itertools import chain

from services.common.errors import FocusError
from services.common.types import FinishedEvent, TokenEvent
from services.llm.engine_stats import Event

FULL_GATHERING_STREAMS = 8
"""Answers that run together from which on tokens are gathered for the whole time that is allowed."""


def gathering_s(longest_s: float, streams: int) -> float:
    """Seconds that tokens are gathered for while so many answers run: none for one, in proportion to the others."""
    return longest_s * min(1.0, max(streams - 1, 0) / (FULL_GATHERING_STREAMS - 1))


class EventStream:
    """Events of one answer. `put` and `take` are called on the event loop where it was made."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._events: list[Event | FocusError] = []
        self._ready = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._handed_over_at = -math.inf

    def put(self, event: Event | FocusError, gather_s: float) -> None:
        """Adds an event. A token is ready no sooner than `gather_s` after the tokens before it; all others at once."""
        self._events.append(event)
        if self._ready.is_set():
            return
        due = self._handed_over_at + gather_s
        if not isinstance(event, TokenEvent) or due <= self.loop.time():
            self._hand_over()
        elif self._timer is None:
            self._timer = self.loop.call_at(due, self._hand_over)

    async def take(self) -> list[Event | FocusError]:
        """Waits until events are ready; those of tokens that follow each other are one."""
        await self._ready.wait()
        self._ready.clear()
        events, self._events = self._events, []
        self._handed_over_at = self.loop.time()
        return merged(events)

    def close(self) -> None:
        """Hands nothing over any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _hand_over(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._ready.set()


def merged(events: Iterable[Event | FocusError]) -> list[Event | FocusError]:
    """The events, each run of token events as one."""
    out: list[Event | FocusError] = []
    tokens: list[TokenEvent] = []
    for event in events:
        if isinstance(event, TokenEvent):
            tokens.append(event)
            continue
        if tokens:
            out.append(_one(tokens))
            tokens = []
        out.append(event)
    if tokens:
        out.append(_one(tokens))
    return out


def _one(tokens: list[TokenEvent]) -> TokenEvent:
    if len(tokens) == 1:
        return tokens[0]
    return TokenEvent(
        text="".join(token.text for token in tokens),
        token_ids=tuple(chain.from_iterable(token.token_ids for token in tokens)),
        logprobs=tuple(chain.from_iterable(token.logprobs for token in tokens)),
        prompt_tokens=tokens[0].prompt_tokens,
    )


def is_last(event: Event | FocusError) -> bool:
    """Whether nothing follows the event."""
    return isinstance(event, FinishedEvent | FocusError)
