"""FocusClient: ask, stream the answer, read its accounting."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
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


class AnswerStream(StreamState):
    """Iterate for the text of an answer as it is generated.

    The request goes out with the first iteration. Leaving a `with` block, or `close()`, before the end cancels it on
    the server. Raises FocusClientError.
    """

    def __init__(self, client: FocusClient, request: focus_pb2.ChatRequest, attempts: Attempts):
        super().__init__()
        self._client = client
        self._request = request
        self._attempts = attempts
        self._call: Any = None
        self._closed = False
        self._pieces = self._receive()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the iteration and cancels the request. Safe to call twice, after the end, and from another thread."""
        self._closed = True
        self._cancel()

    def result(self) -> Answer:
        """Reads to the end."""
        for _ in self:
            pass
        return self._state.answer()

    def _cancel(self) -> None:
        if self._call is not None:
            self._call.cancel()

    def _receive(self) -> Iterator[str]:
        try:
            event = self._first_event()
            while event is not None:
                if text := self._state.take(event):
                    yield text
                event = next(self._call, None)
        except grpc.RpcError as error:
            if self._closed:
                return
            raise from_rpc_error(error, self._client.address) from None
        finally:
            self._cancel()  # an interrupt or a dropped iterator ends the call on the server too
        if not self._closed:
            self._state.answer()

    def _first_event(self) -> focus_pb2.ChatResponse | None:
        while not self._closed:
            try:
                self._call = self._client._stub.Chat(self._request, **self._attempts.call_options())
                if self._closed:
                    self._cancel()
                return next(self._call, None)
            except grpc.RpcError as error:
                if self._closed:
                    raise
                time.sleep(self._attempts.delay_after(error))
        return None


class FocusClient:
    """A connection to the gateway; safe to share between threads.

    `timeout_s` is the deadline of each request unless a request brings its own; None waits for ever. `credentials` turn
    TLS on, which a token needs on any network that is not yours.
    """

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
            grpc.secure_channel(address, credentials, CHANNEL_OPTIONS)
            if credentials
            else grpc.insecure_channel(address, CHANNEL_OPTIONS)
        )
        self._stub = focus_pb2_grpc.FocusServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; answers under way are cancelled."""
        self._channel.close()

    def ask(
        self,
        images: Images,
        question: str,
        *,
        history: Sequence[Turn] = (),
        timeout_s: float | None = None,
        **settings: Unpack[Settings],
    ) -> AnswerStream:
        """Asks about no, one or several images, after the turns of `history`."""
        return self.chat([*history, question_turn(images, question)], timeout_s=timeout_s, **settings)

    def chat(
        self, turns: Sequence[Turn], *, timeout_s: float | None = None, **settings: Unpack[Settings]
    ) -> AnswerStream:
        """Answers the last of the turns, which is a user's."""
        return AnswerStream(self, build_request(turns, **settings), self._attempts(timeout_s))

    def model_info(self, *, timeout_s: float | None = None) -> ModelInfo:
        """What is served, and its limits. Raises FocusClientError."""
        attempts = self._attempts(timeout_s)
        while True:
            try:
                request = focus_pb2.GetModelInfoRequest()
                return model_info(self._stub.GetModelInfo(request, **attempts.call_options()))
            except grpc.RpcError as error:
                time.sleep(attempts.delay_after(error))

    def _attempts(self, timeout_s: float | None) -> Attempts:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        return Attempts(self.address, timeout_s, self._retry, self._metadata)
