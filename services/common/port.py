"""A stage's own gRPC port in each of its replicas: the way of the gateway's calls, with no proxy between.

Ray Serve's ingress takes every message through one Python process a node. The gateway asks Serve which replicas run
(`services/gateway/replicas.py`) and calls one of them here. What Serve's router does for calls that it routes is done
here for these: strangers are refused, so many calls run at a time, so many wait, and a replica that goes finishes its
calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import secrets
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection
from typing import Any, Protocol

import grpc
import grpc.aio

from services.common.errors import FocusError, Overloaded
from services.common.grpc_status import Refused, refuse
from services.common.stage_secret import check_secret, shared_secret
from services.common.tracing import server_interceptors
from services.common.unreadable import SafeReading, check_readable

SHELF_NAMES_METADATA = "focusllava-shelf-names"
"""The LLM stage ends a call with it: under which names the request's images lie on its node's shelf, comma between."""
MAX_MESSAGE_BYTES = 512 * 2**20
SERVER_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Gateways on other nodes ping, so that they notice a node that is lost.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
]


class Limits(Protocol):
    """A deployment's limits, in Serve's names."""

    max_ongoing_requests: int
    max_queued_requests: int
    """Below 0: any number."""


class Places:
    """Places for the calls that run at a time; others wait, first come, first served, as many as may."""

    def __init__(self, limits: Callable[[], Limits]):
        """limits: says what holds now."""
        self._limits = limits
        self._running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def taken(self) -> int:
        """Calls that run or wait."""
        return self._running + len(self._waiting)

    @property
    def waiting(self) -> int:
        """Calls that wait."""
        return len(self._waiting)

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """A place for the time of a `with` block. Raises Overloaded where too many wait."""
        await self._take()
        try:
            yield
        finally:
            self._running -= 1
            self._give()

    async def _take(self) -> None:
        limits = self._limits()
        if self._running < limits.max_ongoing_requests and not self._waiting:
            self._running += 1
            return
        most = limits.max_queued_requests
        if 0 <= most <= len(self._waiting):
            raise Overloaded(f"{len(self._waiting)} calls wait, the limit is {most} (max_queued_requests)")
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # it was given just now
                self._running -= 1
                self._give()
            else:
                with contextlib.suppress(ValueError):  # a place that was given up is passed over, perhaps just now
                    self._waiting.remove(place)
            raise

    def _give(self) -> None:
        while self._waiting and self._running < self._limits().max_ongoing_requests:
            place = self._waiting.popleft()
            if not place.done():
                self._running += 1
                place.set_result(None)


class StagePort:
    """The gRPC server of one replica. `start` and `close` belong on the event loop of the stage's methods."""

    def __init__(
        self,
        stage: object,
        add_to_server: Callable[..., None],
        limits: Callable[[], Limits],
        *,
        unlimited: Collection[str] = (),
    ):
        """stage: has a method for each RPC, which takes the request and a context, and raises Refused.

        add_to_server: generated code that adds the service; unlimited: methods that need no place.
        """
        self.places = Places(limits)
        self._stage, self._add_to_server, self._unlimited = stage, add_to_server, frozenset(unlimited)
        self._secret = secrets.token_hex(32)  # Serve's controller tells it to those who may talk to Ray
        self._accepted = self._secret, shared_secret(os.environ)
        self._server: grpc.aio.Server | None = None
        self.is_closing = False

    async def start(self, host: str) -> dict[str, str]:
        """Listens at a free port of `host`; returns what the gateway needs to call."""
        interceptors = [*server_interceptors(), SafeReading()]
        self._server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=interceptors)
        self._add_to_server(_Servicer(self), self._server)
        place = f"[{host}]" if ":" in host else host
        port = self._server.add_insecure_port(f"{place}:0")
        await self._server.start()
        return {"address": f"{place}:{port}", "secret": self._secret}

    async def close(self, grace_s: float) -> None:
        """Takes no call any more, and ends those that still run after `grace_s`."""
        self.is_closing = True
        if self._server is not None:
            await self._server.stop(grace_s)

    def admit(self, context: Any) -> None:
        """Raises WrongSecret unless the call bears this replica's secret or the one that clusters share.

        A stage's methods ask it themselves: Serve's public port leads to them too, past this one.
        """
        check_secret(context, self._accepted)

    def handler(self, name: str) -> Callable[[Any, grpc.aio.ServicerContext], Any]:
        """What gRPC calls for the method of this name."""
        method = getattr(self._stage, name)
        limited = name not in self._unlimited

        async def unary(request: Any, context: grpc.aio.ServicerContext) -> Any:
            async with self._admitted(context, limited):
                check_readable(request)
                return await method(request, context)

        async def streaming(request: Any, context: grpc.aio.ServicerContext) -> AsyncGenerator[Any, None]:
            async with self._admitted(context, limited):
                check_readable(request)
                async with contextlib.aclosing(method(request, context)) as events:
                    async for event in events:
                        yield event

        return streaming if inspect.isasyncgenfunction(method) else unary

    @contextlib.asynccontextmanager
    async def _admitted(self, context: grpc.aio.ServicerContext, limited: bool) -> AsyncIterator[None]:
        try:
            self.admit(context)  # before it takes a place
            async with self.places.one() if limited else contextlib.nullcontext():
                yield
        except Refused as refused:
            await _abort(context, refused.code.value, refused.args[1])
        except FocusError as error:  # a stranger, no room, or unreadable
            ours = refuse(context, error)
            await _abort(context, ours.code.value, ours.args[1])


class _Servicer:
    """Has every method that generated code asks for."""

    def __init__(self, port: StagePort):
        self._port = port

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return self._port.handler(name)


def _abort(context: grpc.aio.ServicerContext, code: str, message: str) -> Awaitable[None]:
    return context.abort(grpc.StatusCode[code], message)
