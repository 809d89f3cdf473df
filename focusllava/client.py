"""FocusClient: ask, stream the answer, read its accounting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Self

import grpc

from focusllava.connection import Client, StreamState
from focusllava.messages import Answer, ModelInfo
from focusllava.v1 import focus_pb2
from focusllava.wire import model_info


class AnswerStream(StreamState):
    """Iterate for the text of an answer as it is generated.

    The request goes out with the first iteration. Leaving a `with` block before the end, or `close()` from any thread,
    cancels it on the server. Raises FocusClientError.
    """

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._pieces = self._receive()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def result(self) -> Answer:
        """Reads to the end, and returns the whole answer."""
        for _ in self:
            pass
        return self._state.answer()

    def _receive(self) -> Iterator[str]:
        try:
            while not self._closed:
                try:
                    self._start()
                    for event in self._call:
                        if text := self._take(event):
                            yield text
                    break
                except grpc.RpcError as error:
                    time.sleep(self._delay_after(error))
        finally:
            self._cancel()  # an interrupt or a dropped iterator ends the call on the server too
        self._end()


class FocusClient(Client[AnswerStream]):
    """A connection to the gateway; safe to share between threads.

    `timeout_s` is the deadline of each request, from its first iteration on, unless a request brings its own; None
    waits for ever. `api_key` is for a server that asks for one, or a proxy in front of it. `credentials` turn TLS on,
    which a key needs on any network that is not yours.
    """

    _grpc = grpc
    _stream = AnswerStream

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; answers under way are cancelled."""
        self._closed = True
        self._channel.close()

    def model_info(self, *, timeout_s: float | None = None) -> ModelInfo:
        """Asks which model is served, and its limits. Raises FocusClientError."""
        attempts = self._new_attempts(timeout_s)
        while True:
            try:
                request = focus_pb2.GetModelInfoRequest()
                info = self._service.GetModelInfo(request, **attempts.call_options())
                self._reached = True
                return model_info(info)
            except grpc.RpcError as error:
                time.sleep(attempts.delay_after(error))
