"""Who goes to the stages next. So much goes at once; what is beyond waits, and the callers take turns.

A caller's turns are counted in tokens: each has a number, which grows by what its requests weigh, and of those who wait
the one with the lowest goes next (start-time fair queueing; Sheng et al., OSDI 2024, count an LLM's tokens so). A
caller who comes back begins at the number of whoever went last: a pause earns nothing. Where too much waits, whoever
has most of it there loses what came last. So one caller's storm costs the others one turn at most.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from services.common.errors import Overloaded
from services.common.settings import Count
from services.common.telemetry import Metrics
from services.gateway.callers import Caller


@dataclass(frozen=True, kw_only=True)
class Load:
    """What requests weigh, or the most that they may."""

    requests: Count = 1
    tokens: int
    """Tokens of the prompt, images unpruned, and of the longest answer: an estimate, from text's characters."""
    tiles: int
    """Tiles of images, which the encoder works on."""

    def __add__(self, other: Load) -> Load:
        return Load(
            requests=self.requests + other.requests,
            tokens=self.tokens + other.tokens,
            tiles=self.tiles + other.tiles,
        )

    def __sub__(self, other: Load) -> Load:
        return self + Load(requests=-other.requests, tokens=-other.tokens, tiles=-other.tiles)

    def share_of(self, room: Load) -> float:
        """The part of the room that it takes, where it takes most."""
        return max(self.requests / room.requests, self.tokens / room.tokens, self.tiles / room.tiles)


NOTHING = Load(requests=0, tokens=0, tiles=0)


@dataclass(eq=False)
class _Waiter:
    load: Load
    turn: asyncio.Future[None]


@dataclass(eq=False)
class _Line:
    """What one caller has waiting, first come first."""

    waiters: deque[_Waiter] = field(default_factory=deque)
    load: Load = NOTHING


class Turns:
    """The stages' door for one event loop. `running` and `waiting` may be changed at any time."""

    def __init__(self, running: Load, waiting: Load, metrics: Metrics):
        self.running, self.waiting, self._metrics = running, waiting, metrics
        self._inside = NOTHING
        self._lines: dict[str, _Line] = {}
        self._numbers: dict[str, int] = {}
        """Tokens of each caller that went in, as the module says."""
        self._latest = 0
        """The number of whoever went in last, before that turn."""

    @contextlib.asynccontextmanager
    async def turn(self, caller: Caller, load: Load) -> AsyncIterator[None]:
        """Waits for the caller's turn, which lasts to the end of the block. Raises Overloaded where too much waits."""
        await self._wait(caller.name, load)
        try:
            yield
        finally:
            self._inside -= load
            self._let_in()

    async def _wait(self, caller: str, load: Load) -> None:
        if not self._lines and self._fits(load):
            self._go_in(caller, load)
            return
        self._make_room(caller, load)
        line = self._lines.setdefault(caller, _Line())
        if not line.waiters:
            self._numbers[caller] = max(self._numbers.get(caller, 0), self._latest)
        waiter = _Waiter(load, asyncio.get_running_loop().create_future())
        line.waiters.append(waiter)
        line.load += load
        self._tell()
        try:
            await waiter.turn
        except BaseException:  # the caller left, or lost its place
            if waiter.turn.done() and not waiter.turn.cancelled() and waiter.turn.exception() is None:
                self._inside -= load  # its turn had just come
            elif waiter in line.waiters:
                self._take_out(caller, line, waiter)
            self._let_in()
            raise

    def _fits(self, load: Load) -> bool:
        """Whether it may go in now; what is larger than the whole room goes alone."""
        return not self._inside.requests or (self._inside + load).share_of(self.running) <= 1

    def _go_in(self, caller: str, load: Load) -> None:
        self._latest = max(self._numbers.get(caller, 0), self._latest)
        self._numbers[caller] = self._latest + load.tokens
        self._inside += load

    def _let_in(self) -> None:
        while self._lines:
            caller = min(self._lines, key=self._numbers.__getitem__)
            line = self._lines[caller]
            first = line.waiters[0]
            if first.turn.done():  # its caller left at this moment
                self._take_out(caller, line, first)
                continue
            if not self._fits(first.load):
                break
            self._take_out(caller, line, first)
            self._go_in(caller, first.load)
            first.turn.set_result(None)
        self._tell()

    def _take_out(self, caller: str, line: _Line, waiter: _Waiter) -> None:
        line.waiters.remove(waiter)
        line.load -= waiter.load
        if not line.waiters:
            del self._lines[caller]

    def _make_room(self, caller: str, load: Load) -> None:
        """Raises Overloaded where the newcomer, or its caller, has the largest part of what waits."""
        mine = self._lines[caller].load + load if caller in self._lines else load
        while self._lines and (self._waits() + load).share_of(self.waiting) > 1:
            largest = max(self._lines, key=lambda name: self._lines[name].load.share_of(self.waiting))
            line = self._lines[largest]
            if largest == caller or line.load.share_of(self.waiting) <= mine.share_of(self.waiting):
                raise _full()
            last = line.waiters[-1]
            self._take_out(largest, line, last)
            if not last.turn.done():
                last.turn.set_exception(_full())

    def _waits(self) -> Load:
        total = NOTHING
        for line in self._lines.values():
            total += line.load
        return total

    def _tell(self) -> None:
        waits = self._waits()
        self._metrics.set("focusllava_waiting_at_gateway", waits.requests)
        self._metrics.set("focusllava_waiting_tokens", waits.tokens)
        self._metrics.set("focusllava_waiting_tiles", waits.tiles)


def _full() -> Overloaded:
    return Overloaded("the server is full; try again later")
