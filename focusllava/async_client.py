"""AsyncFocusClient: FocusClient for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self, Unpack

import grpc

from focusllava.connection import (
    CHANNEL_OPTIONS,
    DEFAULT_ADDRESS,
    Attempts,
    RetryPolicy,
    StreamState,
    fixed_metadata,
)
from focusllava.errors import from_rpc_error
from focusllava.messages import Answer, Images, ModelInfo, Settings, Turn, build_request, model_info, question_turn
from focusllava.v1 import focus_pb2, focus_pb2_grpc


class AsyncAnswerStream(StreamState):
    """AnswerStream for `async for`. Closing it, or cancelling the task that iterates, cancels the request."""

    def __init__(self, client: AsyncFocusClient, request: focus_pb2.ChatRequest, attempts: Attempts):
        super().__init__()
        self._client = client
        self._request = request
        self._attempts = attempts
        self._call: Any = None
        self._closed = False
        self._pieces = self._receive()

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        return await anext(self._pieces)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the iteration and cancels the request. Safe to call twice and after the end."""
        self._closed = True
        self._cancel()

    async def result(self) -> Answer:
        """Reads to the end."""
        async for _ in self:
            pass
        return self._state.answer()

    def _cancel(self) -> None:
        if self._call is not None:
            self._call.cancel()

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
                self._call = self._client._stub.Chat(self._request, **self._attempts.call_options())
                return await self._next_event()
            except grpc.RpcError as error:
                if self._closed:
                    raise
                await asyncio.sleep(self._attempts.delay_after(error))
        return None

    async def _next_event(self) -> focus_pb2.ChatResponse | None:
        event = await self._call.read()
        return None if event is grpc.aio.EOF else event


class AsyncFocusClient:
    """FocusClient for asyncio, with the same arguments; make it inside the running loop."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float | None = None,
        token: str | None = None,
        application: str = "gateway",
        retry: RetryPolicy | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ):
        self.address = address
        self._timeout_s = timeout_s
        self._retry = retry or RetryPolicy()
        self._metadata = fixed_metadata(application, token)
        self._channel = (
            grpc.aio.secure_channel(address, credentials, CHANNEL_OPTIONS)
            if credentials
            else grpc.aio.insecure_channel(address, CHANNEL_OPTIONS)
        )
        self._stub: Any = focus_pb2_grpc.FocusServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection; answers under way are cancelled."""
        await self._channel.close()

    def ask(
        self,
        images: Images,
        question: str,
        *,
        history: Sequence[Turn] = (),
        timeout_s: float | None = None,
        **settings: Unpack[Settings],
    ) -> AsyncAnswerStream:
        """Asks about no, one or several images, after the turns of `history`."""
        return self.chat([*history, question_turn(images, question)], timeout_s=timeout_s, **settings)

    def chat(
        self, turns: Sequence[Turn], *, timeout_s: float | None = None, **settings: Unpack[Settings]
    ) -> AsyncAnswerStream:
        """Answers the last of the turns, which is a user's."""
        return AsyncAnswerStream(self, build_request(turns, **settings), self._attempts(timeout_s))

    async def model_info(self, *, timeout_s: float | None = None) -> ModelInfo:
        """What is served, and its limits. Raises FocusClientError."""
        attempts = self._attempts(timeout_s)
        while True:
            try:
                request = focus_pb2.GetModelInfoRequest()
                return model_info(await self._stub.GetModelInfo(request, **attempts.call_options()))
            except grpc.RpcError as error:
                await asyncio.sleep(attempts.delay_after(error))

    def _attempts(self, timeout_s: float | None) -> Attempts:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        return Attempts(self.address, timeout_s, self._retry, self._metadata)
