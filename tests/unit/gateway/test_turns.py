"""Who goes to the stages next under a storm, who is refused, and how many bytes of requests are held."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from services.common.errors import Overloaded
from services.gateway.callers import ApiKey, Caller
from services.gateway.held_bytes import HeldBytes
from services.gateway.turns import NOTHING, Load, Turns
from tests.fakes.stages import METRICS

MUCH = Load(requests=10**6, tokens=10**9, tiles=10**6)


def key(name: str) -> Caller:
    return Caller(ApiKey(name=name, sha256="0" * 64))


A, B, C = key("a"), key("b"), key("c")


class Storm:
    """Requests that go in, are noted, and stay until they are told to end."""

    def __init__(self, running: Load, waiting: Load = MUCH):
        self.turns = Turns(running, waiting, METRICS)
        self.order: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []
        self._ends: list[asyncio.Event] = []

    async def ask(self, caller: Caller, count: int = 1, tokens: int = 10, tiles: int = 0) -> list[asyncio.Task[None]]:
        new = [asyncio.create_task(self._one(caller, Load(tokens=tokens, tiles=tiles))) for _ in range(count)]
        self.tasks += new
        await settle()
        return new

    async def _one(self, caller: Caller, load: Load) -> None:
        async with self.turns.turn(caller, load):
            self.order.append(caller.name)
            end = asyncio.Event()
            self._ends.append(end)
            await end.wait()

    async def end(self, count: int = 1) -> None:
        for _ in range(count):
            self._ends.pop(0).set()
            await settle()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def storm(running: Load, waiting: Load = MUCH):
    found = Storm(running, waiting)
    try:
        yield found
    finally:
        for task in found.tasks:
            task.cancel()
        await asyncio.gather(*found.tasks, return_exceptions=True)
        assert found.turns._inside == NOTHING and not found.turns._lines  # nothing is lost, whatever happened


ONE = Load(requests=1, tokens=10**6, tiles=100)


async def test_a_key_that_asks_once_waits_for_one_turn_of_a_storm():
    async with storm(ONE) as door:
        await door.ask(A, 50)
        await door.ask(B)
        await door.end(2)
        assert door.order == ["a", "b", "a"]


async def test_keys_take_turns_by_tokens_not_by_requests():
    async with storm(ONE) as door:
        await door.ask(C)
        await door.ask(A, 40, tokens=10)
        await door.ask(B, 40, tokens=30)
        await door.end(40)
        gone = door.order[1:]
        assert gone.count("a") == 3 * gone.count("b")


async def test_a_pause_earns_nothing():
    async with storm(ONE) as door:
        await door.ask(A, 30)
        await door.end(20)  # b was away all that time
        await door.ask(B, 20)
        await door.end(9)
        assert door.order[-8:].count("a") == door.order[-8:].count("b") == 4


async def test_what_goes_at_once_is_bounded_in_requests_tokens_and_tiles():
    for running, least in [
        (Load(requests=3, tokens=10**6, tiles=10**6), 3),
        (Load(requests=100, tokens=45, tiles=10**6), 4),
        (Load(requests=100, tokens=10**6, tiles=10), 2),
    ]:
        async with storm(running) as door:
            await door.ask(A, 20, tokens=10, tiles=5)
            assert len(door.order) == least
            await door.end(5)
            assert len(door.order) == least + 5


async def test_what_is_larger_than_all_room_goes_alone_and_is_not_passed_for_ever():
    async with storm(Load(requests=10, tokens=100, tiles=10)) as door:
        await door.ask(A, 2, tokens=40)
        await door.ask(B, tokens=1000)
        await door.ask(A, 5, tokens=1)  # would fit beside the first two
        assert door.order == ["a", "a"]
        await door.end(2)
        assert door.order == ["a", "a", "b"]
        await door.end(1)
        assert len(door.order) == 8


@pytest.mark.parametrize(
    "waiting",
    [
        Load(requests=4, tokens=10**6, tiles=10**6),
        Load(requests=100, tokens=40, tiles=10**6),
        Load(requests=100, tokens=10**6, tiles=8),
    ],
)
async def test_where_too_much_waits_whoever_has_most_there_loses_what_came_last(waiting):
    async with storm(ONE, waiting) as door:
        first = await door.ask(A, 10, tokens=10, tiles=2)
        refused = [task for task in first if task.done()]
        assert refused == first[5:]  # one is in, four wait
        with pytest.raises(Overloaded, match="the server is full; try again later"):
            await refused[0]
        (one,) = await door.ask(B, tokens=10, tiles=2)
        assert not one.done() and first[4].done() and not first[3].done()
        with pytest.raises(Overloaded):
            await first[4]
        await door.end(2)
        assert door.order == ["a", "b", "a"]


async def test_who_leaves_while_waiting_or_at_its_turn_takes_no_place():
    async with storm(ONE) as door:
        (first, second, third) = await door.ask(A, 3)
        second.cancel()
        await settle()
        door._ends.pop(0).set()
        await asyncio.sleep(0)
        assert door.turns._inside.requests == 1 and len(door.order) == 1
        third.cancel()  # its turn has come, and it does not know yet
        await settle()
        await door.ask(B)
        assert door.order == ["a", "b"]


async def test_a_newcomer_that_would_have_most_is_refused_and_nobody_loses_a_place():
    async with storm(ONE, Load(requests=100, tokens=100, tiles=100)) as door:
        await door.ask(C)
        (waits,) = await door.ask(A, tokens=60)
        (refused,) = await door.ask(B, tokens=80)
        assert refused.done() and not waits.done()
        await door.end(1)
        assert door.order == ["c", "a"]


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_comes_and_leaves_no_bound_is_passed_and_no_place_lost(seed):
    draw = random.Random(seed)
    running, waiting = Load(requests=4, tokens=100, tiles=20), Load(requests=8, tokens=200, tiles=40)
    async with storm(running, waiting) as door:
        for _ in range(400):
            action = draw.random()
            if action < 0.6:
                await door.ask(draw.choice((A, B, C)), tokens=draw.randint(1, 120), tiles=draw.randint(0, 15))
            elif action < 0.8 and door.tasks:
                draw.choice(door.tasks).cancel()
                if draw.random() < 0.5:
                    await settle()
            elif door._ends:
                door._ends.pop(draw.randrange(len(door._ends))).set()
                if draw.random() < 0.5:
                    await settle()
            inside, waits = door.turns._inside, door.turns._waits()
            assert inside.share_of(running) <= 1 or inside.requests == 1
            assert waits.share_of(waiting) <= 1 or waits.requests == 1
        assert door.order
    refused = [task for task in door.tasks if not task.cancelled() and task.exception() is not None]
    assert refused and all(isinstance(task.exception(), Overloaded) for task in refused)


async def test_new_limits_count_at_once():
    async with storm(ONE) as door:
        await door.ask(A, 10)
        door.turns.running = Load(requests=4, tokens=10**6, tiles=100)
        await door.end()
        assert len(door.order) == 5


def test_bytes_in_flight_are_bounded():
    held = HeldBytes(100, METRICS)
    anybody = Caller()
    with held.holding(anybody, 60) as first:
        with pytest.raises(Overloaded, match="the server holds 60 bytes of requests, its limit is 100"):
            with held.holding(anybody, 41):
                pass
        with held.holding(anybody, 40), pytest.raises(Overloaded):
            first.add(1)
        first.add(40)
    with held.holding(anybody, 1000):  # alone it is let in: its own limits are the body's
        pass
    with held.holding(anybody, 100):
        pass


def test_one_key_leaves_bytes_for_the_next():
    held = HeldBytes(1000, METRICS)
    with contextlib.ExitStack() as stack:
        taken = 0
        with pytest.raises(Overloaded):
            while True:
                stack.enter_context(held.holding(A, 50))
                taken += 50
        assert 450 <= taken <= 550
        stack.enter_context(held.holding(B, 300))
        with pytest.raises(Overloaded):
            stack.enter_context(held.holding(B, 300))
        stack.enter_context(held.holding(C, 100))
    assert held._total == 0 and not held._of_each
