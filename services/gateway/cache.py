"""Visual-token cache: the same image, checkpoint and sampler settings are encoded once.

Values are serialised CompressedVisualTokens messages, verified when read. A store that fails is a miss, never an error.
Megabytes are serialised and verified off the event loop, as far as protobuf lets go of the GIL.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from focusllava.v1 import encoder_pb2
from services.common import wire
from services.common.errors import InvalidInput, NotOnShelf
from services.common.logs import LOGGER
from services.common.shelf import Shelf
from services.common.telemetry import Metrics
from services.common.types import ImageOptions
from services.gateway.stores import Store, StoreFailed

_log = logging.getLogger(LOGGER)

_SMALL_BYTES = 2**20
"""A value up to this size is verified on the event loop."""


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
        if self.options.map_share is not None:
            how += f":{self.options.map_share:g}"
        return f"focusllava:visual-tokens:3:{self.model_fingerprint}:{how}:{self.content_hash}"


@dataclass
class _Flight:
    task: asyncio.Task[tuple[encoder_pb2.CompressedVisualTokens, bool]]
    waiters: int = 0


class VisualTokenCache:
    """Looks up, or encodes once however many requests ask at the same time."""

    def __init__(self, store: Store, metrics: Metrics, shelf: Shelf | None = None):
        """shelf: this node's, on which a value's tokens may lie."""
        self.store, self._metrics, self._shelf = store, metrics, shelf
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
        return await self._join(key, flight)

    async def _join(self, key: CacheKey, flight: _Flight) -> tuple[encoder_pb2.CompressedVisualTokens, bool]:
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.task.done():
                self._forget(key, flight)
                flight.task.cancel()

    async def find(self, key: CacheKey) -> encoder_pb2.CompressedVisualTokens | None:
        """The tokens, where they are known or just being encoded; None costs nobody an encoding, and is no miss."""
        flight = self._flights.get(key)
        if flight is None:
            return await self._read(key, misses_count=False)
        return (await self._join(key, flight))[0]

    async def discard(self, key: CacheKey) -> None:
        """Has the next request encode the image anew."""
        with contextlib.suppress(StoreFailed):
            await self.store.put(str(key), b"")  # no message, so nobody takes it for one

    def report(self) -> None:
        """Sets the gauge of what the cache holds."""
        self._metrics.set("focusllava_cache_bytes", self.store.held_bytes)

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

    async def _read(self, key: CacheKey, *, misses_count: bool = True) -> encoder_pb2.CompressedVisualTokens | None:
        started = time.perf_counter()
        try:
            value = await self.store.get(str(key))
        except StoreFailed:
            self._metrics.count("focusllava_cache_lookups", result="error")
            return None
        tokens = await self._verified(value, key) if value is not None else None
        if tokens is not None or misses_count:
            self._metrics.count("focusllava_cache_lookups", result="miss" if tokens is None else "hit")
        self._metrics.count("focusllava_cache_read_bytes", len(value) if value and tokens is not None else 0)
        if value is not None and tokens is None:
            _log.warning("visual-token cache: an unusable value was ignored (%s)", key)
        _log.debug("cache read took %.1f ms", (time.perf_counter() - started) * 1000)
        return tokens

    async def _verified(self, value: bytes, key: CacheKey) -> encoder_pb2.CompressedVisualTokens | None:
        if len(value) < _SMALL_BYTES:  # a thread would cost more
            return verified(value, key, self._shelf)
        return await asyncio.to_thread(verified, value, key, self._shelf)

    def _value(self, tokens: encoder_pb2.CompressedVisualTokens) -> bytes:
        """What is stored; empty where the tokens are gone. Another node has another shelf: it needs the bytes."""
        if not (self.store.is_shared and tokens.shelf_name):
            return tokens.SerializeToString()
        whole = encoder_pb2.CompressedVisualTokens()
        whole.CopyFrom(tokens)
        return whole.SerializeToString() if wire.unshelve(whole, self._shelf) else b""

    async def _write(self, key: CacheKey, tokens: encoder_pb2.CompressedVisualTokens) -> None:
        value = await asyncio.to_thread(self._value, tokens)
        if not value:  # gone already
            return
        try:
            await self.store.put(str(key), value)
        except StoreFailed:
            return
        self._metrics.count("focusllava_cache_written_bytes", len(value))
        self.report()


def verified(value: bytes, key: CacheKey, shelf: Shelf | None = None) -> encoder_pb2.CompressedVisualTokens | None:
    """The message, if it parses, is whole, and is the one that the key asks for; otherwise None."""
    message = encoder_pb2.CompressedVisualTokens()
    try:
        message.ParseFromString(value)
        wire.check_tokens(message, shelf=shelf)
    except (InvalidInput, NotOnShelf, ValueError):
        return None
    except Exception as error:  # protobuf's DecodeError, whose base class differs between its implementations
        _log.debug("cache value does not parse: %s", error)
        return None
    same = (message.content_hash, message.model_fingerprint) == (key.content_hash, key.model_fingerprint)
    return message if same and (key.vision_sampler or not message.branch_ids) else None
