"""Visual-token cache: the same image, checkpoint and sampler settings are encoded once.

Values are serialised CompressedVisualTokens messages, verified when read. A store that fails is a miss, never an error.
Megabytes are serialised and verified off the event loop, as far as protobuf lets go of the GIL.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from focusllava.v1 import encoder_pb2
from services.common import wire
from services.common.errors import InvalidInput
from services.common.telemetry import Metrics
from services.common.types import ImageOptions

_log = logging.getLogger("focusllava")

CACHE_BYTES = 256 * 2**20
"""Bound of a cache in the gateway's process, where the settings say none."""
_MAX_GETS, _MAX_PUTS = 16, 4
"""Calls of Redis under way; more wait. A burst of new connections alone can take longer than a get may."""
_FAILURES = (redis.RedisError, OSError, TimeoutError, ValueError)


@dataclass(frozen=True, kw_only=True)
class CacheKey:
    """What decides the visual tokens of an image, as far as the gateway knows it.

    The encoder's `dtype` and `wire_dtype` change tokens too, and only the encoder knows them: flush Redis after a
    change of these, or it gives what was encoded before for up to a day (`RedisStore.ttl_s`).
    """

    content_hash: str
    """SHA-256 (hex) of the image file's bytes."""
    model_fingerprint: str
    vision_sampler: bool
    options: ImageOptions = field(default_factory=ImageOptions)

    def __str__(self) -> str:
        sampler = "sampled" if self.vision_sampler else "full"
        pixels = {None: "", True: "-reduced", False: "-whole"}[self.options.reduced_jpeg]
        how = f"{sampler}:{self.options.detail}{pixels}"
        return f"focusllava:visual-tokens:2:{self.model_fingerprint}:{how}:{self.content_hash}"


class StoreFailed(Exception):
    """The store could not answer in time; counted and served as a miss."""


class Store(Protocol):
    """Bytes by key. Both verbs may raise StoreFailed, nothing else."""

    async def get(self, key: str) -> bytes | None: ...
    async def put(self, key: str, value: bytes) -> None: ...
    async def close(self) -> None: ...
    @property
    def held_bytes(self) -> int: ...


class InProcessStore:
    """Least recently used, bounded in bytes (values and keys)."""

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


class RedisStore:
    """Redis behind a circuit breaker.

    One failed get opens the circuit: until a background PING succeeds, every call fails at once, so a dead or hung
    Redis costs a request nothing after the first `timeout_s`. A get that finds no free connection in `timeout_s` is a
    miss and opens nothing, for Redis is not to blame. Nor does a failed put: no request waits for one, and a value of
    24 MB on a slow network says nothing of the next get.
    """

    held_bytes = 0  # Redis bounds itself (maxmemory, allkeys-lru)

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
            async with asyncio.timeout(timeout_s):
                return await call()
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


@dataclass
class _Flight:
    task: asyncio.Task[tuple[encoder_pb2.CompressedVisualTokens, bool]]
    waiters: int = 0


class VisualTokenCache:
    """Looks up, or encodes once however many requests ask at the same time."""

    def __init__(self, store: Store, metrics: Metrics):
        self.store, self._metrics = store, metrics
        self._flights: dict[CacheKey, _Flight] = {}
        self._writes: set[asyncio.Task[None]] = set()

    async def get_or_encode(
        self, key: CacheKey, encode: Callable[[], Awaitable[encoder_pb2.CompressedVisualTokens]]
    ) -> tuple[encoder_pb2.CompressedVisualTokens, bool]:
        """The tokens, and whether they came from the cache. Raises what `encode` raises.

        A caller that is cancelled leaves the encoding to the others who wait for it; the last one to leave cancels it.
        """
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight(asyncio.create_task(self._fetch(key, encode)))
            flight.task.add_done_callback(lambda _: self._forget(key, flight))
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.task.done():
                self._forget(key, flight)
                flight.task.cancel()

    async def discard(self, key: CacheKey) -> None:
        """Has the next request encode the image anew."""
        with contextlib.suppress(StoreFailed):
            await self.store.put(str(key), b"")  # no message, so nobody takes it for one

    async def flush(self) -> None:
        """Waits for writes under way."""
        await asyncio.gather(*self._writes, return_exceptions=True)

    async def close(self) -> None:
        for flight in list(self._flights.values()):
            flight.task.cancel()
        await self.flush()
        await self.store.close()

    def _forget(self, key: CacheKey, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def _fetch(
        self, key: CacheKey, encode: Callable[[], Awaitable[encoder_pb2.CompressedVisualTokens]]
    ) -> tuple[encoder_pb2.CompressedVisualTokens, bool]:
        found = await self._read(key)
        if found is not None:
            return found, True
        tokens = await encode()
        write = asyncio.create_task(self._write(key, tokens))  # the answer does not wait for it
        self._writes.add(write)
        write.add_done_callback(self._writes.discard)
        return tokens, False

    async def _read(self, key: CacheKey) -> encoder_pb2.CompressedVisualTokens | None:
        started = time.perf_counter()
        try:
            value = await self.store.get(str(key))
        except StoreFailed:
            self._metrics.count("focusllava_cache_lookups", result="error")
            return None
        tokens = await asyncio.to_thread(verified, value, key) if value is not None else None
        self._metrics.count("focusllava_cache_lookups", result="miss" if tokens is None else "hit")
        if value is not None and tokens is None:
            _log.warning("visual-token cache: an unusable value was ignored (%s)", key)
        _log.debug("cache read took %.1f ms", (time.perf_counter() - started) * 1000)
        return tokens

    async def _write(self, key: CacheKey, tokens: encoder_pb2.CompressedVisualTokens) -> None:
        value = await asyncio.to_thread(tokens.SerializeToString)
        try:
            await self.store.put(str(key), value)
        except StoreFailed:
            return
        self._metrics.count("focusllava_cache_written_bytes", len(value))
        self._metrics.set("focusllava_cache_bytes", self.store.held_bytes)


def verified(value: bytes, key: CacheKey) -> encoder_pb2.CompressedVisualTokens | None:
    """The message, if it parses, is whole, and is the one that the key asks for; otherwise None."""
    message = encoder_pb2.CompressedVisualTokens()
    try:
        message.ParseFromString(value)
        wire.tokens_from_proto(message)
    except (InvalidInput, ValueError):
        return None
    except Exception as error:  # protobuf's DecodeError, whose base class differs between its implementations
        _log.debug("cache value does not parse: %s", error)
        return None
    same = (message.content_hash, message.model_fingerprint) == (key.content_hash, key.model_fingerprint)
    return message if same and (key.vision_sampler or not message.branch_ids) else None
