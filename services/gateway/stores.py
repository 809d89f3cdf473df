"""Where the visual-token cache keeps its values: in the gateway's process, or in Redis behind a circuit breaker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from services.common.logs import LOGGER

_log = logging.getLogger(LOGGER)

CACHE_BYTES = 256 * 2**20
"""Bound of a cache in the gateway's process, where the settings say none."""
_MAX_GETS, _MAX_PUTS = 16, 4
"""Calls of Redis under way; more wait. A burst of new connections alone can take longer than a get may."""
_FAILURES = (redis.RedisError, OSError, TimeoutError, ValueError)


class StoreFailed(Exception):
    """The store could not answer in time; counted and served as a miss."""


class Store(Protocol):
    """Bytes by key. Both verbs may raise StoreFailed, nothing else."""

    async def get(self, key: str) -> bytes | None: ...
    async def put(self, key: str, value: bytes) -> None: ...
    async def close(self) -> None: ...
    @property
    def held_bytes(self) -> int: ...
    @property
    def is_shared(self) -> bool:
        """Whether other nodes read it, which have other shelves."""


class InProcessStore:
    """Least recently used, bounded in bytes (values and keys)."""

    is_shared = False

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self._values: OrderedDict[str, bytes] = OrderedDict()

    async def get(self, key: str) -> bytes | None:
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    async def put(self, key: str, value: bytes) -> None:
        if key in self._values:
            self.held_bytes -= len(key) + len(self._values.pop(key))
        if len(key) + len(value) > self.max_bytes:
            return
        self._values[key] = value
        self.held_bytes += len(key) + len(value)
        while self.held_bytes > self.max_bytes:
            old_key, old_value = self._values.popitem(last=False)
            self.held_bytes -= len(old_key) + len(old_value)

    async def close(self) -> None:
        self._values.clear()
        self.held_bytes = 0


LATE_S = 0.05
"""A timeout that is noticed this much too late says that the event loop was busy, not that Redis was slow."""


class RedisStore:
    """Redis behind a circuit breaker.

    One failed get opens the circuit: until a background PING succeeds, every call fails at once, so a dead or hung
    Redis costs a request nothing after the first `timeout_s`. A get that finds no free connection in `timeout_s` is a
    miss and opens nothing, for Redis is not to blame; nor one whose time is found to be over too late, for then this
    process is too busy to see an answer. Without its cache it would encode every image and be busier still. A failed
    put opens nothing either: no request waits for one, and a value of 24 MB on a slow network says nothing of the next
    get.
    """

    held_bytes = 0  # Redis bounds itself (maxmemory, allkeys-lru)
    is_shared = True

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 0.25,
        put_timeout_s: float = 5.0,
        probe_period_s: float = 1.0,
        ttl_s: int = 86_400,
    ):
        self.timeout_s, self.put_timeout_s = timeout_s, put_timeout_s
        self.probe_period_s, self.ttl_s = probe_period_s, ttl_s
        # One connection each; apart, so that slow writes never keep a request waiting. The pool has room for all, and
        # the PING: its own wait for a connection would end in the same error as a Redis that is gone.
        self._gets, self._puts = asyncio.Semaphore(_MAX_GETS), asyncio.Semaphore(_MAX_PUTS)
        self._client = redis.asyncio.Redis.from_url(
            url,
            decode_responses=False,
            socket_timeout=max(timeout_s, put_timeout_s),  # a backstop: each call has its own timeout
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            max_connections=_MAX_GETS + _MAX_PUTS + 1,
        )
        self._probe: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether the circuit is open: Redis failed and has not answered since."""
        return self._probe is not None and not self._probe.done()

    async def get(self, key: str) -> bytes | None:
        try:
            return await self._call(lambda: self._client.get(key), self._gets, self.timeout_s)
        except _FAILURES as error:
            if not self.is_open:
                _log.warning("visual-token cache: Redis failed (%s); serving without it", type(error).__name__)
                self._probe = asyncio.create_task(self._wait_until_it_answers())
            raise StoreFailed(type(error).__name__) from error

    async def put(self, key: str, value: bytes) -> None:
        try:
            await self._call(lambda: self._client.set(key, value, ex=self.ttl_s), self._puts, self.put_timeout_s)
        except _FAILURES as error:
            _log.warning("visual-token cache: %d bytes were not stored (%s)", len(value), type(error).__name__)
            raise StoreFailed(type(error).__name__) from error

    async def close(self) -> None:
        if self._probe:
            self._probe.cancel()
        with contextlib.suppress(Exception):
            await self._client.aclose()

    async def _call(self, call: Callable[[], Awaitable[Any]], free: asyncio.Semaphore, timeout_s: float) -> Any:
        """Raises StoreFailed when Redis is not asked at all, one of _FAILURES when it fails."""
        self._check_closed()
        try:
            async with asyncio.timeout(timeout_s):
                await free.acquire()
        except TimeoutError:
            raise StoreFailed("every connection is in use") from None
        try:
            self._check_closed()  # those before this one may have found out
            began = time.monotonic()
            try:
                async with asyncio.timeout(timeout_s):
                    return await call()
            except TimeoutError:
                if time.monotonic() - began > timeout_s + LATE_S:
                    raise StoreFailed("this process was too busy to see the answer") from None
                raise
        finally:
            free.release()

    def _check_closed(self) -> None:
        if self.is_open:
            raise StoreFailed("circuit open")

    async def _wait_until_it_answers(self) -> None:
        while True:
            await asyncio.sleep(self.probe_period_s)
            with contextlib.suppress(*_FAILURES):
                async with asyncio.timeout(self.timeout_s):
                    await self._client.ping()
                _log.warning("visual-token cache: Redis answers again")
                return


def open_store(redis_url: str | None, max_bytes: int, *, timeout_s: float = 0.25, put_timeout_s: float = 5.0) -> Store:
    """Redis when a URL is set, with these timeouts, otherwise a cache in this process of at most `max_bytes`."""
    if redis_url:
        return RedisStore(redis_url, timeout_s=timeout_s, put_timeout_s=put_timeout_s)
    return InProcessStore(max_bytes)
