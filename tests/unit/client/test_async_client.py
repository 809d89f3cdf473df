"""The asynchronous client against a scripted gateway: many streams, retry, deadline, cancel."""

from __future__ import annotations

import asyncio
import socket

import grpc
import pytest

from focusllava import (
    AsyncFocusClient,
    FocusClientError,
)
from tests.fakes.gateway import QUICK, ScriptedGateway, failed, started


async def test_async_streams_concurrently(gateway: ScriptedGateway) -> None:
    async with AsyncFocusClient(gateway.address, timeout_s=20) as client:
        answers = await asyncio.gather(*(client.ask(b"i", f"q{n}").result() for n in range(6)))
        pieces = [text async for text in client.ask(None, "q")]
        assert (await client.model_info()).name == "focusllava-tiny"
    assert {answer.text for answer in answers} == {"a red café"} and pieces == ["a ", "red ", "café"]
    assert len(gateway.requests) == 7


async def test_async_retry_deadline_and_error(gateway: ScriptedGateway) -> None:
    async with AsyncFocusClient(gateway.address, timeout_s=20, retry=QUICK) as client:
        gateway.script = gateway.refusing(grpc.StatusCode.UNAVAILABLE, "restarting", times=2)
        assert (await client.ask(None, "q").result()).text == "a red café"
        gateway.script = gateway.refusing(grpc.StatusCode.UNAVAILABLE, "restarting")
        with pytest.raises(FocusClientError, match="UNAVAILABLE"):
            await client.ask(None, "q").result()
        gateway.script = gateway.endless
        with pytest.raises(FocusClientError, match="DEADLINE_EXCEEDED"):
            await client.ask(None, "q", timeout_s=0.2).result()
        gateway.script = lambda request, context: iter([started(), failed("INVALID_ARGUMENT", "bad")])
        with pytest.raises(FocusClientError, match="INVALID_ARGUMENT: bad"):
            await client.ask(None, "q").result()


async def test_async_close_and_task_cancellation_reach_the_server(gateway: ScriptedGateway) -> None:
    gateway.script = gateway.endless
    async with AsyncFocusClient(gateway.address) as client:
        async with client.ask(None, "q") as stream:
            assert await anext(stream) == "x"
        assert await asyncio.to_thread(gateway.cancelled.wait, 5)
        assert [text async for text in stream] == []

        gateway.cancelled.clear()
        stream = client.ask(None, "q")
        reading = asyncio.create_task(stream.result())
        while not stream.text:
            await asyncio.sleep(0.01)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert await asyncio.to_thread(gateway.cancelled.wait, 5)


async def test_async_close_ends_a_waiting_iteration(gateway: ScriptedGateway) -> None:
    gateway.script = gateway.endless
    async with AsyncFocusClient(gateway.address) as client:
        stream = client.ask(None, "q")
        await anext(stream)
        reading = asyncio.create_task(stream.result())
        await asyncio.sleep(0.05)
        stream.close()
        with pytest.raises(FocusClientError, match="broke off"):  # result() has no whole answer to give
            await asyncio.wait_for(reading, 5)


async def test_async_closing_the_client_ends_its_streams(gateway: ScriptedGateway) -> None:
    gateway.script = gateway.endless
    client = AsyncFocusClient(gateway.address)
    running, waiting = client.ask(None, "q"), client.ask(None, "q")
    await anext(running)
    reading = asyncio.create_task(running.result())
    await asyncio.sleep(0.05)
    await client.close()
    for use, code in ((reading, "CANCELLED"), (waiting.result(), "FAILED_PRECONDITION"),
                      (client.model_info(), "FAILED_PRECONDITION")):  # fmt: skip
        with pytest.raises(FocusClientError) as caught:
            await asyncio.wait_for(use, 5)
        assert caught.value.code == code


async def test_async_closing_the_client_ends_a_waiting_model_info() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        client = AsyncFocusClient(f"127.0.0.1:{mute.getsockname()[1]}")
        waiting = asyncio.create_task(client.model_info())
        await asyncio.sleep(0.1)
        await client.close()
        with pytest.raises(FocusClientError, match="CANCELLED"):
            await asyncio.wait_for(waiting, 5)


async def test_async_a_cancelled_task_stays_cancelled_where_the_client_is_closed(gateway: ScriptedGateway) -> None:
    gateway.script = gateway.endless
    client = AsyncFocusClient(gateway.address)
    stream = client.ask(None, "q")
    await anext(stream)
    reading = asyncio.create_task(stream.result())
    await asyncio.sleep(0.05)
    reading.cancel()
    await client.close()
    with pytest.raises(asyncio.CancelledError):
        await reading
