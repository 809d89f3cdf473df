"""Events of one answer: tokens wait for those after them under load, and nothing else ever waits."""

from __future__ import annotations

import asyncio

from services.common.errors import InternalError
from services.common.types import FinishedEvent, TokenEvent, TokenLogprob, TokenLogprobs, Usage
from services.llm.event_stream import FULL_GATHERING_STREAMS, EventStream, gathering_s

LONG_S = 600.0
END = FinishedEvent(reason="stop", usage=Usage())


def token(number: int) -> TokenEvent:
    logprobs = TokenLogprobs(chosen=TokenLogprob(token_id=number, logprob=-1.0))
    return TokenEvent(text=f"t{number} ", token_ids=(number,), logprobs=(logprobs,), prompt_tokens=9)


async def some_turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_gathering_begins_with_the_second_answer_and_has_an_upper_bound():
    assert gathering_s(0.05, 0) == gathering_s(0.05, 1) == 0.0
    assert 0 < gathering_s(0.05, 2) < gathering_s(0.05, 3) < 0.05
    assert gathering_s(0.05, FULL_GATHERING_STREAMS) == gathering_s(0.05, 500) == 0.05
    assert gathering_s(0.0, 500) == 0.0


async def test_without_gathering_every_token_is_ready_at_once():
    stream = EventStream()
    for number in range(3):
        stream.put(token(number), 0.0)
        assert await stream.take() == [token(number)]


async def test_the_first_token_never_waits_and_those_after_it_come_as_one():
    stream = EventStream()
    stream.put(token(0), LONG_S)
    assert await stream.take() == [token(0)]
    for number in (1, 2, 3):
        stream.put(token(number), LONG_S)
    taken = asyncio.create_task(stream.take())
    await some_turns()
    assert not taken.done()
    stream.put(END, LONG_S)
    gathered, end = await taken
    assert end is END and gathered.text == "t1 t2 t3 " and gathered.token_ids == (1, 2, 3)
    assert [entry.chosen.token_id for entry in gathered.logprobs] == [1, 2, 3] and gathered.prompt_tokens == 9
    stream.close()


async def test_gathered_tokens_are_ready_when_their_time_is_over_though_nothing_follows():
    stream = EventStream()
    stream.put(token(0), 0.01)
    await stream.take()
    stream.put(token(1), 0.01)
    stream.put(token(2), 0.01)
    (gathered,) = await asyncio.wait_for(stream.take(), 30)
    assert gathered.token_ids == (1, 2)


async def test_an_error_takes_along_what_was_gathered():
    stream, error = EventStream(), InternalError("broken")
    stream.put(token(0), LONG_S)
    await stream.take()
    stream.put(token(1), LONG_S)
    stream.put(error, LONG_S)
    assert await stream.take() == [token(1), error]


async def test_a_slow_reader_gets_all_that_has_come_as_one():
    stream = EventStream()
    for number in range(4):
        stream.put(token(number), 0.0)
    (gathered,) = await stream.take()
    assert gathered.token_ids == (0, 1, 2, 3)
