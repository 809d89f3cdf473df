"""AsyncFocusClient: FocusClient for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Self

import grpc

from focusllava.connection import Client, StreamState
from focusllava.errors import FocusClientError
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
        """Reads to the end, and returns the whole answer."""
        async for _ in self:
            pass
        return self._state.answer()

    async def _receive(self) -> AsyncIterator[str]:
        try:
            while not self._closed:
                try:
                    self._start()
                    while (event := await self._call.read()) is not grpc.aio.EOF:
                        if text := self._take(event):
                            yield text
                    break
                except grpc.RpcError as error:
                    await asyncio.sleep(self._delay_after(error))
        except asyncio.CancelledError:
            if not self._closed:
                _raise_where_closed(self._client)
                raise
            if _task_is_cancelled():
                raise
        finally:
            self._cancel()
        self._end()


def _task_is_cancelled() -> bool:
    """grpc.aio raises CancelledError for a call that close() ended, too, where nobody cancelled the task itself."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _raise_where_closed(client: Client[Any]) -> None:
    """Raises FocusClientError in place of a CancelledError that the client's close() caused."""
    if client._closed and not _task_is_cancelled():
        raise FocusClientError("CANCELLED", "the client was closed before the answer ended") from None


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
        self._closed = True
        await self._channel.close()

    async def model_info(self, *, timeout_s: float | None = None) -> ModelInfo:
        """Asks which model is served, and its limits. Raises FocusClientError."""
        attempts = self._new_attempts(timeout_s)
        while True:
            try:
                request = focus_pb2.GetModelInfoRequest()
                info = await self._service.GetModelInfo(request, **attempts.call_options())
                self._reached = True
                return model_info(info)
            except grpc.RpcError as error:
                await asyncio.sleep(attempts.delay_after(error))
            except asyncio.CancelledError:
                _raise_where_closed(self)
                raise
