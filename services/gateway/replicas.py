"""The ways to a stage: through Serve's ingress, or straight to one of its replicas, which are chosen here."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grpc.aio

from services.common.errors import StageUnavailable
from services.common.port import MAX_MESSAGE_BYTES
from services.common.stage_secret import SECRET_METADATA
from services.common.telemetry import Metrics
from services.common.tracing import channel_interceptors
from services.gateway.affinity import ranked

Stub = TypeVar("Stub")

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_reconnect_backoff_ms", 1000),  # gRPC's default of two minutes outlives any restart
    # No keepalive: a gRPC server that gets more than one ping in five minutes without data ends the connection
    # (too_many_pings), so a call that waits quietly would be lost. The proxy is on this node: if it dies, TCP says so.
]
REPLICA_CHANNEL_OPTIONS = [
    *CHANNEL_OPTIONS[:2],
    # A replica may be on another node, whose loss TCP tells nobody; its server takes pings (`services/common/port.py`).
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Each replica has channels of its own: a new one may be given the port of one that is lost.
    ("grpc.use_local_subchannel_pool", 1),
]
LOST_S = 3.0
"""A replica that failed is left alone for so long; Serve mostly has found another one by then."""
FULL_S = 1.0
"""A replica that refused a call for lack of room is passed over for so long while another may have some."""
POLL_S = 0.05
IDLE_S = 300.0
"""A channel to a replica that Serve has not named for so long is closed."""

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Replica:
    """A replica of a stage that runs."""

    name: str
    address: str
    secret: str
    shelf: str = ""
    """Identity of its node's shelf (`services/common/shelf.py`); empty where it has none."""


class Replicas(Protocol):
    """Who knows which replicas of a stage run."""

    async def running(self) -> Sequence[Replica]:
        """All of them; where none runs, one is started and waited for. Raises StageUnavailable or Overloaded."""

    async def is_asleep(self) -> bool:
        """Whether none runs because none is wanted: a call would have one started."""


class Line:
    """A channel and what each call on it says."""

    def __init__(self, address: str, metadata: Metadata, options: list[tuple[str, int]], shelf: str = ""):
        """shelf: identity of the shelf at the other end, empty where that is unknown."""
        self.metadata, self.shelf = metadata, shelf
        self.calls = 0
        self.lost_at = self.full_at = self.picked_at = -math.inf
        interceptors = channel_interceptors()
        self._channel = grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
        self._stubs: dict[type, Any] = {}

    def stub(self, cls: type[Stub]) -> Stub:
        """A stub of this generated class."""
        if cls not in self._stubs:
            self._stubs[cls] = cls(self._channel)  # type: ignore[call-arg]
        return self._stubs[cls]  # type: ignore[no-any-return]

    @property
    def is_lost(self) -> bool:
        return time.monotonic() - self.lost_at < LOST_S

    @property
    def is_full(self) -> bool:
        return time.monotonic() - self.full_at < FULL_S

    async def close(self) -> None:
        await self._channel.close(grace=None)


class Way(Protocol):
    """A way to a stage."""

    def line(self, timeout_s: float, beginning: str = "") -> contextlib.AbstractAsyncContextManager[Line]:
        """A line for one call; whoever finds it broken sets `lost_at`, whoever is refused there `full_at`.

        beginning: what the call's prompt begins with, for a way that knows who has it. Raises FocusError.
        """

    def has_room_elsewhere(self) -> bool:
        """Whether a call that was refused just now may find another replica with room."""

    async def is_asleep(self) -> bool:
        """Whether the stage was scaled to zero."""

    async def close(self) -> None: ...


class IngressWay:
    """Through Ray Serve's gRPC ingress, of this cluster or another."""

    def __init__(self, target: str, application: str, secret: str):
        """secret: what the clusters share."""
        self._line = Line(target, (("application", application), (SECRET_METADATA, secret)), CHANNEL_OPTIONS)

    @contextlib.asynccontextmanager
    async def line(self, timeout_s: float, beginning: str = "") -> AsyncIterator[Line]:
        yield self._line

    def has_room_elsewhere(self) -> bool:
        return False

    async def is_asleep(self) -> bool:
        return False

    async def close(self) -> None:
        await self._line.close()


class ReplicaWay:
    """Straight to the replicas: to the one that a prompt's beginning belongs to, else to the one with the fewest calls.

    A beginning belongs to a replica by `ranked`, the same in every gateway. Its replica is passed over where it has
    `affinity` times the mean of this gateway's calls, rounded up: then the next in rank has room. So no replica gets
    more than that of what all gateways send, however popular one image is.
    """

    def __init__(self, stage: str, replicas: Replicas, metrics: Metrics, affinity: float | None = None):
        """affinity: 1 or more; None: no beginning belongs to anybody."""
        self._stage, self._replicas, self._metrics, self._affinity = stage, replicas, metrics, affinity
        self._lines: dict[Replica, Line] = {}

    @contextlib.asynccontextmanager
    async def line(self, timeout_s: float, beginning: str = "") -> AsyncIterator[Line]:
        """Waits up to `timeout_s` where none runs that has not failed just now."""
        try:
            async with asyncio.timeout(timeout_s):
                line = await self._choose(beginning)
        except TimeoutError:
            raise StageUnavailable(f"no replica of the {self._stage} stage can be reached; try again") from None
        line.calls += 1
        try:
            yield line
        finally:
            line.calls -= 1

    def has_room_elsewhere(self) -> bool:
        now = time.monotonic()
        return any(not (line.is_full or line.is_lost or now - line.picked_at > FULL_S) for line in self._lines.values())

    async def is_asleep(self) -> bool:
        return await self._replicas.is_asleep()

    async def _choose(self, beginning: str) -> Line:
        while True:
            lines = {replica: self._line_to(replica) for replica in await self._replicas.running()}
            there = [replica for replica, line in lines.items() if not line.is_lost]
            with_room = [replica for replica in there if not lines[replica].is_full] or there
            if not there:
                await asyncio.sleep(POLL_S)
                continue
            chosen = min(with_room, key=lambda replica: (lines[replica].calls, random.random()))
            if self._affinity is not None and beginning and len(lines) > 1:
                most = math.ceil(self._affinity * (1 + sum(lines[replica].calls for replica in there)) / len(there))
                owner, *_ = order = ranked(list(lines), beginning)
                free = (replica for replica in order if replica in with_room and lines[replica].calls < most)
                chosen = next(free, chosen)
                self._metrics.count("focusllava_owned_calls", to="owner" if chosen == owner else "next")
            return lines[chosen]

    def _line_to(self, replica: Replica) -> Line:
        if replica not in self._lines:
            self._close_idle()
            metadata = ((SECRET_METADATA, replica.secret),)
            self._lines[replica] = Line(replica.address, metadata, REPLICA_CHANNEL_OPTIONS, replica.shelf)
        line = self._lines[replica]
        line.picked_at = time.monotonic()
        return line

    def _close_idle(self) -> None:
        """Closes lines to replicas that are gone: a new one is the occasion."""
        now = time.monotonic()
        for replica, line in list(self._lines.items()):
            if not line.calls and now - line.picked_at > IDLE_S:
                del self._lines[replica]
                asyncio.ensure_future(line.close())

    async def close(self) -> None:
        for line in self._lines.values():
            await line.close()
