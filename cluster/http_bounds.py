"""Bounds on the HTTP connections of Ray Serve's proxy, for which uvicorn and Ray have no switch.

A request takes one of a replica's places, which HTTP and gRPC share, only once all of it has arrived: half a body would
hold the place until its sender goes on. A connection that stalls is closed; where connections or bodies are too many,
those that have waited longest are closed. What Ray itself refuses, in plain text, becomes an error as OpenAI's clients
know it.
"""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, ClassVar

import uvicorn.config
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from services.common.call_metadata import REQUEST_ID_HEADER
from services.gateway.openai.errors import error_object

HEADERS_S = 15.0
"""Longest time from a connection's first moment, or a later request's first byte, to the end of its headers."""
BODY_PIECE_S = 20.0
"""Longest time in which a body may bring nothing."""
BODY_S = 300.0
"""Longest time that a body may take."""
MOST_CONNECTIONS = 1000
"""Most connections of one proxy, where its limit of open files has room for them."""
MOST_BODY_BYTES = 128 * 2**20
"""Largest body of one request; the gateway's own limit is below it and knows the field's name."""
MOST_BODIES_BYTES = 1024 * 2**20
"""Most bytes of all bodies together: those that have arrived in part, and those whose answer has not begun."""
RETRY_AFTER_S = 1
"""What a client is told to wait where the server is full."""

FULL = "the server is full; try again later"

Header = tuple[bytes, bytes]
CLOSE: tuple[Header, ...] = ((b"connection", b"close"),)
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def bound_http() -> None:
    """Makes uvicorn servers that start in this process from now on use the bounded protocol."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:BoundedHttp"  # type: ignore[index]


def most_connections() -> int:
    """The bound on connections: at most half of this process' open files, for gRPC and Ray need the rest."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if soft < 0 else min(MOST_CONNECTIONS, soft // 2)  # negative: no limit


class BoundedHttp(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """One HTTP connection that is closed when it does not go on."""

    waiting: ClassVar[dict[BoundedHttp, None]] = {}
    """Connections that have no whole request yet, the longest wait first."""
    body_bytes: ClassVar[int] = 0
    """Bytes of all bodies, as MOST_BODIES_BYTES has them."""

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.ws_protocol_class = None  # nothing here speaks WebSocket
        self._app: Any = self.app  # type: ignore[has-type]
        self.app = self._whole_requests
        self._headers_timer: asyncio.TimerHandle | None = None
        self._held = 0  # bytes of the body, until its answer begins

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > most_connections() and not drop_longest_waiting():
            transport.abort()
            return
        self.waiting[self] = None
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self.waiting.pop(self, None)
        self._unwatch_headers()
        self._let_go()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._has_headers():
            self._unwatch_headers()
        elif self._headers_timer is None:
            self._watch_headers()  # a later request begins on this connection

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing():
            self.waiting[self] = None

    def _has_headers(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch_headers(self) -> None:
        if not self.transport.is_closing():
            self._headers_timer = self.loop.call_later(HEADERS_S, self.transport.close)

    def _unwatch_headers(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    async def _whole_requests(self, scope: Message, receive: Receive, send: Send) -> None:
        """An ASGI application in front of Ray's: passes a request on when all of it is here."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        body = await self._body(receive, send)
        if body is None:
            return self._let_go()
        self.waiting.pop(self, None)
        answer = Answer(send, scope["path"])

        async def receive_all() -> Message:
            nonlocal body
            if body is None:
                return await receive()  # tells that the client went
            whole, body = body, None
            return {"type": "http.request", "body": whole, "more_body": False}

        async def send_on(message: Message) -> None:
            self._let_go()  # a replica has the body
            await answer.send(message)

        try:
            await self._app(scope, receive_all, send_on)
        finally:
            self._let_go()
        if not answer.begun:  # Ray sends nothing where the replica is gone
            await _refuse(send, 503, "the gateway's replica that had this request is gone; try again")

    async def _body(self, receive: Receive, send: Send) -> bytes | None:
        """The request's body; None where it is refused, or its sender went away."""
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    async with asyncio.timeout(BODY_PIECE_S):
                        message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    piece = message.get("body", b"")
                    if len(body) + len(piece) > MOST_BODY_BYTES:
                        await _refuse(send, 413, f"body: has more than {MOST_BODY_BYTES} bytes")
                        return None
                    body += piece
                    self._count_body(len(piece))
                    while BoundedHttp.body_bytes > MOST_BODIES_BYTES:
                        if not drop_longest_waiting(but=self):
                            await _refuse(send, 429, FULL)
                            return None
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            await _refuse(send, 408, "body: did not come in time")
            return None

    def _count_body(self, change: int) -> None:
        self._held += change
        BoundedHttp.body_bytes += change

    def _let_go(self) -> None:
        self._count_body(-self._held)


class Answer:
    """An answer on its way to the client; what Ray wrote in place of one is translated."""

    def __init__(self, send: Send, path: str):
        self.begun = False
        self._send, self._rays_own = send, path.startswith("/-/")
        self._refused: Message | None = None
        self._text = b""

    async def send(self, message: Message) -> None:
        self.begun = True
        if message["type"] == "http.response.start" and self._is_rays(message):
            self._refused = message
        elif self._refused is None:
            await self._send(message)
        else:
            self._text += message.get("body", b"")
            if not message.get("more_body", False):
                status, said = refusal_of(self._refused["status"], self._text.decode(errors="replace"))
                kept = [pair for pair in self._refused["headers"] if pair[0].lower() == REQUEST_ID_HEADER.encode()]
                await _refuse(self._send, status, said, headers=kept)

    def _is_rays(self, start: Message) -> bool:
        """Whether Ray's proxy made it, or a stage, which has no HTTP: the gateway answers in JSON or events."""
        content_type = dict(start["headers"]).get(b"content-type", b"")
        return start["status"] in (404, 408, 429, 503) and content_type.startswith(b"text/plain") and not self._rays_own


def refusal_of(status: int, text: str) -> tuple[int, str]:
    """The status and the line of ours for one of Ray's."""
    if status == 429 or "backpressure" in text or "max_queued_requests" in text:
        return 429, FULL
    if status == 404:
        return 404, "nothing is here; OpenAI's API is at /v1"
    if status == 408:
        return 408, "the answer took longer than this server allows (request_timeout_s)"
    return 503, "the gateway has no replica that is ready; try again"


def drop_longest_waiting(*, but: BoundedHttp | None = None) -> bool:
    """Ends the connection that has waited longest for the rest of a request; False where none waits."""
    oldest = next((connection for connection in BoundedHttp.waiting if connection is not but), None)
    if oldest is None:
        return False
    del BoundedHttp.waiting[oldest]
    oldest._let_go()
    oldest.transport.abort()
    return True


async def _refuse(send: Send, status: int, message: str, *, headers: Sequence[Header] = CLOSE) -> None:
    """Sends an error as the gateway does. Without `headers` the connection ends: the rest of a body may still come."""
    code = "rate_limit_exceeded" if status == 429 else None
    content = json.dumps(error_object(status, message, code=code)).encode()
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if status in (429, 503):
        own.append((b"retry-after", str(RETRY_AFTER_S).encode()))
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": content})
