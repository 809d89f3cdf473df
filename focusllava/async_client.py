"""AsyncFocusClient: FocusClient for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Self

import grpc

from focusllava.connection import Client, StreamState
from focusllava.errors import from_rpc_error
from focusllava.messages import Answer, ModelInfo
from focusllava.v1 import focus_pb2
from focusllava.wire import model_info


class AsyncAnswerStream(StreamState):
    """AnswerStream for `async for`. Closing it, or cancelling the task that iterates, cancels the request."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._pieces = self._receive()

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        return await anext(self._pieces)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    async def result(self) -> Answer:
        """Reads to the end."""
        async for _ in self:
            pass
        return self._state.answer()

    async def _receive(self) -> AsyncIterator[str]:
        try:
            event = await self._first_event()
            while event is not None:
                if text := self._state.take(event):
                    yield text
                event = await self._next_event()
        except grpc.RpcError as error:
            if self._closed:
                return
            raise from_rpc_error(error, self._client.address) from None
        except asyncio.CancelledError:
            # grpc.aio raises this for a call cancelled by close(), where nobody cancelled the task itself.
            task = asyncio.current_task()
            if self._closed and (task is None or not task.cancelling()):
                return
            raise
        finally:
            self._cancel()
        if not self._closed:
            self._state.answer()

    async def _first_event(self) -> focus_pb2.ChatResponse | None:
        while not self._closed:
            try:
                self._start()
                return await self._next_event()
            except grpc.RpcError as error:
                if self._closed:
                    raise
                await asyncio.sleep(self._attempts.delay_after(error))
        return None

    async def _next_event(self) -> focus_pb2.ChatResponse | None:
        event = await self._call.read()
        return None if event is grpc.aio.EOF else event


class AsyncFocusClient(Client[AsyncAnswerStream]):
    """FocusClient for asyncio, with the same arguments; make it inside the running loop."""

    _grpc = grpc.aio
    _stream = AsyncAnswerStream

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection; answers under way are cancelled."""
        await self._channel.close()

    async def model_info(self, *, timeout_s: float | None = None) -> ModelInfo:
        """What is served, and its limits. Raises FocusClientError."""
        attempts = self._new_attempts(timeout_s)
        while True:
            try:
                request = focus_pb2.GetModelInfoRequest()
                return model_info(await self._stub.GetModelInfo(request, **attempts.call_options()))
            except grpc.RpcError as error:
                await asyncio.sleep(attempts.delay_after(error))
