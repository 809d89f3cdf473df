"""What both clients share: the connection, the deadline and the retries of a request, a stream's state."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar, Unpack

import grpc

from focusllava.arguments import checked_address, checked_api_key, checked_timeout
from focusllava.errors import FocusClientError, from_rpc_error, is_not_connected
from focusllava.messages import MAX_IMAGES_BYTES, ImageInfo, Images, Settings, TokenLogprobs, Turn, Usage, user
from focusllava.v1 import focus_pb2, focus_pb2_grpc
from focusllava.wire import AnswerState, build_request

DEFAULT_ADDRESS = "127.0.0.1:9000"
_MAX_MESSAGE_BYTES = MAX_IMAGES_BYTES + 2**20  # the words come beside the images
CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_reconnect_backoff_ms", 1000),  # a restarted proxy is found again within about a second
    ("grpc.enable_retries", 0),  # RetryPolicy is the only one
)


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """Tries after UNAVAILABLE, only before the first text: what the caller has read is never sent twice."""

    attempts: int | None = None
    """Most tries, the first included; None leaves it to the times."""
    patience_s: float = 60.0
    """Longest wait for a server that has answered this client, or that says itself that it restarts. A lost proxy is
    back in 5 to 10 s, or in half a minute with Ray Serve's default health checks."""
    patience_to_connect_s: float = 20.0
    """Longest wait for a server that this client has never reached: its address may be wrong."""
    first_delay_s: float = 0.2
    max_delay_s: float = 2.0
    on_wait: Callable[[FocusClientError], None] | None = None
    """Called with the error of each failed try, before the wait for the next."""

    def delay_s(self, failed: int) -> float:
        """Wait after so many failed attempts (1 or more): doubles, with jitter so that not all return at once."""
        return min(self.first_delay_s * 2 ** min(failed - 1, 30), self.max_delay_s) * random.uniform(0.5, 1.0)


def fixed_metadata(application: str, api_key: str | None) -> tuple[tuple[str, str], ...]:
    """`application` picks the Ray Serve application behind the port; a key is sent as a bearer token."""
    authorization = (("authorization", f"Bearer {api_key}"),) if api_key else ()
    return (("application", application), *authorization)


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """W3C's traceparent of the current span, in a program that uses OpenTelemetry; nothing in any other."""
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple(carrier.items())


class Attempts:
    """The deadline and the retries of one request; the deadline counts from its first call."""

    def __init__(self, client: Client[Any], timeout_s: float | None):
        self._client = client
        self._timeout_s = timeout_s
        self._deadline: float | None = None
        self._began: float | None = None
        self._failed = 0

    def call_options(self) -> dict[str, Any]:
        """Keyword arguments of the next call: what remains of the deadline, and the metadata."""
        if self._began is None:
            self._began = time.monotonic()
            self._deadline = None if self._timeout_s is None else self._began + self._timeout_s
        remaining_s, metadata = self.remaining_s(), (*self._client._metadata, *trace_metadata())
        if remaining_s is None:
            return {"timeout": None, "metadata": metadata}
        # Ray Serve hides a call's own deadline from the gateway, so it is said in the metadata too.
        return {
            "timeout": remaining_s,
            "metadata": (*metadata, ("focusllava-timeout-ms", str(round(remaining_s * 1000)))),
        }

    def remaining_s(self) -> float | None:
        """Seconds to the deadline, 0 or more; None without one."""
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)

    def delay_after(self, error: grpc.RpcError) -> float:
        """Seconds to wait before the next attempt. Raises FocusClientError where there is to be none."""
        assert self._began is not None, "nothing was called"
        self._failed += 1
        retry, remaining = self._client._retry, self.remaining_s()
        self._client._reached = self._client._reached or not is_not_connected(error)
        patience_s = retry.patience_s if self._client._reached else retry.patience_to_connect_s
        delay = retry.delay_s(self._failed)
        if (
            error.code() is not grpc.StatusCode.UNAVAILABLE
            or (retry.attempts is not None and self._failed >= retry.attempts)
            or time.monotonic() - self._began + delay > patience_s
            or (remaining is not None and delay >= remaining)
        ):
            raise self.failure(error) from None
        if retry.on_wait:
            retry.on_wait(self.failure(error))
        return delay

    def failure(self, error: grpc.RpcError) -> FocusClientError:
        """The error for the caller, where there is no next attempt."""
        return from_rpc_error(error, self._client.address, deadline_passed=self.remaining_s() == 0)


class StreamState:
    """What a stream has brought so far; the accounting is there once the iteration has ended."""

    def __init__(self, client: Client[Any], request: focus_pb2.ChatRequest, attempts: Attempts):
        self._state = AnswerState()
        self._client = client
        self._request = request
        self._attempts = attempts
        self._call: Any = None
        self._closed = False

    @property
    def text(self) -> str:
        """The text of the answer up to here."""
        return self._state.text

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        """Log probabilities of the tokens up to here, where the setting `logprobs` was given."""
        return tuple(self._state.logprobs)

    @property
    def images(self) -> tuple[ImageInfo, ...]:
        """How the server read each image; empty before the first text."""
        return self._state.images

    @property
    def finish_reason(self) -> str:
        """stop, length or abort; empty before the end."""
        return self._state.finish_reason

    @property
    def usage(self) -> Usage | None:
        """The accounting; None before the end."""
        return self._state.usage

    def close(self) -> None:
        """Ends the iteration and cancels the request. Safe to call twice and after the end."""
        self._closed = True
        self._cancel()

    def _cancel(self) -> None:
        if self._call is not None:
            self._call.cancel()

    def _start(self) -> None:
        self._call = self._client._service.Chat(self._request, **self._attempts.call_options())
        if self._closed:  # by another thread, just now
            self._cancel()

    def _take(self, event: focus_pb2.ChatResponse) -> str:
        self._client._reached = True
        return self._state.take(event)

    def _delay_after(self, error: grpc.RpcError) -> float:
        """Seconds to the next attempt, none after close(). Raises FocusClientError where there is to be none.

        Text that was handed on is never asked for twice; what came without any, such as how the images were read, is
        dropped.
        """
        if self._closed:
            return 0.0
        if self._state.text or self._state.finish_reason:
            raise self._attempts.failure(error) from None
        delay = self._attempts.delay_after(error)
        self._state = AnswerState()
        return delay

    def _end(self) -> None:
        """Checks the stream after its last event. Raises FocusClientError where the stream broke off."""
        if not self._closed:
            self._state.answer()


Stream = TypeVar("Stream", bound=StreamState)


class Client(Generic[Stream]):
    """What both clients do alike; how they are used stands at FocusClient."""

    _grpc: ClassVar[Any]
    """grpc or grpc.aio."""
    _stream: type[Stream]

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float | None = None,
        api_key: str | None = None,
        application: str = "gateway",
        retry: RetryPolicy | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ):
        self.address = checked_address(address)
        self._timeout_s = checked_timeout(timeout_s)
        self._retry = retry or RetryPolicy()
        self._metadata = fixed_metadata(application, checked_api_key(api_key))
        self._closed = False
        self._reached = False  # whether anything has answered at the address
        self._channel: Any = (
            self._grpc.secure_channel(address, credentials, CHANNEL_OPTIONS)
            if credentials
            else self._grpc.insecure_channel(address, CHANNEL_OPTIONS)
        )
        self._stub: Any = focus_pb2_grpc.FocusServiceStub(self._channel)

    @property
    def _service(self) -> Any:
        """The stub. Raises FocusClientError where the client is closed: gRPC would raise errors of its own."""
        if self._closed:
            raise FocusClientError("FAILED_PRECONDITION", f"the client of {self.address} is closed; make another")
        return self._stub

    def ask(
        self,
        images: Images,
        question: str,
        *,
        history: Sequence[Turn] = (),
        detail: str | None = None,
        reduced_jpeg: bool | None = None,
        map_share: float | None = None,
        timeout_s: float | None = None,
        **settings: Unpack[Settings],
    ) -> Stream:
        """Asks about no, one or several images, each read as `ImageFile` says, after the turns of `history`."""
        asked = user(question, images=images, detail=detail, reduced_jpeg=reduced_jpeg, map_share=map_share)
        return self.chat([*history, asked], timeout_s=timeout_s, **settings)

    def chat(self, turns: Sequence[Turn], *, timeout_s: float | None = None, **settings: Unpack[Settings]) -> Stream:
        """Answers the last of the turns, which is a user's."""
        return self._stream(self, build_request(turns, **settings), self._new_attempts(timeout_s))

    def _new_attempts(self, timeout_s: float | None) -> Attempts:
        timeout_s = self._timeout_s if timeout_s is None else checked_timeout(timeout_s)
        return Attempts(self, timeout_s)
