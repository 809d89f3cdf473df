"""The visual-token cache against a real redis-server that lives, hangs and dies, and in one process."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import time

import pytest

from benchmarks.redis_server import RedisServer
from services.common.errors import InvalidInput
from services.common.telemetry import Metrics
from services.common.types import ImageOptions
from services.gateway.cache import CacheKey, VisualTokenCache, verified
from services.gateway.stores import InProcessStore, RedisStore, StoreFailed, open_store
from tests.fakes.stages import KEY, message_for


class Encoder:
    """Counts how often it encodes."""

    def __init__(self, message, delay_s: float = 0.0):
        self.message, self.delay_s, self.calls, self.cancelled = message, delay_s, 0, 0

    async def __call__(self):
        self.calls += 1
        try:
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if isinstance(self.message, Exception):
            raise self.message
        return self.message


class Counts:
    """A metrics backend that adds up counters."""

    def __init__(self):
        self.totals: dict[str, float] = {}
        totals = self.totals

        class Metric:
            def __init__(self, name, description, tag_keys, boundaries=None):
                self.name = name

            def inc(self, value, tags):
                key = ":".join((self.name, *tags.values()))
                totals[key] = totals.get(key, 0) + value

            def set(self, value, tags): ...
            def observe(self, value, tags): ...

        self.Counter = self.Gauge = self.Histogram = Metric

    def lookups(self, result: str) -> float:
        return self.totals.get(f"focusllava_cache_lookups:{result}", 0)


@pytest.fixture
def redis_server(tmp_path):
    server = RedisServer(tmp_path)
    yield server
    server.kill()


def cache_over(store) -> tuple[VisualTokenCache, Counts]:
    counts = Counts()
    return VisualTokenCache(store, Metrics("gateway", counts)), counts


async def test_redis_serves_another_gateway(redis_server):
    encoder = Encoder(message_for(KEY))
    first, _ = cache_over(RedisStore(redis_server.url, timeout_s=5))
    second, counts = cache_over(RedisStore(redis_server.url, timeout_s=5))
    _, cached = await first.get_or_encode(KEY, encoder)
    await first.flush()
    tokens, hit = await second.get_or_encode(KEY, encoder)
    assert (cached, hit, encoder.calls) == (False, True, 1)
    assert tokens == encoder.message and counts.lookups("hit") == 1
    assert 0 < await second.store._client.ttl(str(KEY)) <= 86_400
    await first.close()
    await second.close()


async def test_killed_redis_is_a_miss_and_comes_back(redis_server):
    encoder = Encoder(message_for(KEY))
    cache, counts = cache_over(RedisStore(redis_server.url, timeout_s=2, probe_period_s=0.1))
    await cache.get_or_encode(KEY, encoder)
    await cache.flush()
    assert (await cache.get_or_encode(KEY, encoder))[1]
    redis_server.kill()
    for _ in range(5):
        tokens, hit = await cache.get_or_encode(KEY, encoder)
        assert tokens == encoder.message and not hit
    await cache.flush()
    assert counts.lookups("error") == 5 and cache.store.is_open
    redis_server.start()
    until = time.monotonic() + 20
    while cache.store.is_open and time.monotonic() < until:
        await asyncio.sleep(0.05)
    await cache.get_or_encode(KEY, encoder)
    await cache.flush()
    assert (await cache.get_or_encode(KEY, encoder))[1], "Redis answers again, and so does the cache"
    await cache.close()


async def test_hung_redis_costs_one_timeout_then_nothing(redis_server):
    encoder = Encoder(message_for(KEY))
    cache, counts = cache_over(RedisStore(redis_server.url, timeout_s=0.3, probe_period_s=60))
    await cache.get_or_encode(KEY, encoder)
    await cache.flush()
    redis_server.process.send_signal(signal.SIGSTOP)
    await cache.get_or_encode(KEY, encoder)  # pays the timeout and opens the circuit
    started = time.perf_counter()
    for _ in range(20):
        assert not (await cache.get_or_encode(KEY, encoder))[1]
        await cache.flush()
    assert time.perf_counter() - started < 0.3  # 20 requests together, less than one timeout
    assert counts.lookups("error") == 21
    await cache.close()


async def test_more_requests_at_once_than_connections_wait_their_turn(redis_server):
    store = RedisStore(redis_server.url, timeout_s=20)
    await store.put("key", b"value")
    assert await asyncio.gather(*(store.get("key") for _ in range(300))) == [b"value"] * 300
    assert not store.is_open
    await store.close()


async def test_running_out_of_connections_is_a_miss_of_that_request_alone(redis_server):
    store = RedisStore(redis_server.url, timeout_s=0.2)
    store._gets = asyncio.Semaphore(0)  # as if others had them all, for longer than one waits
    with pytest.raises(StoreFailed, match="every connection is in use"):
        await store.get("key")
    assert not store.is_open, "Redis is not to blame"
    store._gets.release()
    assert await store.get("key") is None
    await store.close()


async def test_an_event_loop_that_is_busy_is_not_the_fault_of_redis(redis_server):
    store = RedisStore(redis_server.url, timeout_s=0.2, probe_period_s=60)
    await store.put("key", b"value")
    assert await store.get("key") == b"value"
    asked = asyncio.create_task(store.get("key"))
    await asyncio.sleep(0)
    redis_server.process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(0.01)
    time.sleep(0.5)  # what a burst of other requests does
    redis_server.process.send_signal(signal.SIGCONT)
    with contextlib.suppress(StoreFailed):  # or the answer had come before
        await asked
    assert not store.is_open and await store.get("key") == b"value"
    await store.close()


async def test_a_put_has_a_time_of_its_own_and_its_failure_blinds_nobody(redis_server, caplog):
    store = RedisStore(redis_server.url, timeout_s=0.3, put_timeout_s=20)
    assert await store.get("key") is None
    redis_server.process.send_signal(signal.SIGSTOP)
    slow = asyncio.create_task(store.put("key", bytes(24 * 2**20)))
    await asyncio.sleep(1)
    redis_server.process.send_signal(signal.SIGCONT)
    await slow  # longer than timeout_s
    store.put_timeout_s = 0.2
    redis_server.process.send_signal(signal.SIGSTOP)
    with pytest.raises(StoreFailed, match="TimeoutError"):
        await store.put("other", bytes(24 * 2**20))
    redis_server.process.send_signal(signal.SIGCONT)
    assert not store.is_open and "25165824 bytes were not stored" in caplog.text
    store.timeout_s = 20
    assert len(await store.get("key")) == 24 * 2**20
    await store.close()


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "redis://no-such-host.invalid:6379/0"])
async def test_redis_that_was_never_there_is_a_miss(url):
    cache, counts = cache_over(RedisStore(url, timeout_s=0.3))
    assert not (await cache.get_or_encode(KEY, Encoder(message_for(KEY))))[1]
    assert counts.lookups("error") == 1
    await cache.close()


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"not a message \xff",
        message_for(KEY).SerializeToString()[:-30],
        message_for(dataclasses.replace(KEY, content_hash="c" * 64)).SerializeToString(),
        message_for(dataclasses.replace(KEY, model_fingerprint="d" * 64)).SerializeToString(),
    ],
)
async def test_a_poisoned_value_is_a_miss_and_is_replaced(redis_server, value):
    store = RedisStore(redis_server.url, timeout_s=5)
    await store.put(str(KEY), value)
    cache, counts = cache_over(store)
    encoder = Encoder(message_for(KEY))
    assert not (await cache.get_or_encode(KEY, encoder))[1]
    await cache.flush()
    assert counts.lookups("miss") == 1
    assert (await cache.get_or_encode(KEY, encoder))[1] and encoder.calls == 1
    await cache.close()


async def test_wrong_type_of_key_in_redis_is_a_miss(redis_server):
    store = RedisStore(redis_server.url, timeout_s=5)
    await store._client.lpush(str(KEY), "x")
    cache, _ = cache_over(store)
    assert not (await cache.get_or_encode(KEY, Encoder(message_for(KEY))))[1]
    await cache.close()


def test_unsampled_key_refuses_sampled_tokens():
    full = CacheKey(content_hash="a" * 64, model_fingerprint="b" * 64, vision_sampler=False)
    assert verified(message_for(KEY).SerializeToString(), full) is None
    assert verified(message_for(full).SerializeToString(), full) == message_for(full)


def test_every_part_of_the_key_matters():
    others = [
        dataclasses.replace(KEY, content_hash="c" * 64),
        dataclasses.replace(KEY, model_fingerprint="d" * 64),
        dataclasses.replace(KEY, vision_sampler=False),
        dataclasses.replace(KEY, options=ImageOptions(detail="low")),
        dataclasses.replace(KEY, options=ImageOptions(reduced_jpeg=True)),
        dataclasses.replace(KEY, options=ImageOptions(reduced_jpeg=False)),
        dataclasses.replace(KEY, options=ImageOptions(map_share=0.5)),
        dataclasses.replace(KEY, options=ImageOptions(map_share=0.25)),
    ]
    assert len({str(key) for key in (KEY, *others)}) == len({KEY, *others}) == 9


async def test_at_the_same_time_encodes_once():
    cache, _ = cache_over(InProcessStore(10**6))
    encoder = Encoder(message_for(KEY), delay_s=0.05)
    answers = await asyncio.gather(*(cache.get_or_encode(KEY, encoder) for _ in range(8)))
    assert encoder.calls == 1 and all(tokens == encoder.message and not hit for tokens, hit in answers)


async def test_one_caller_leaving_does_not_cancel_the_others():
    cache, _ = cache_over(InProcessStore(10**6))
    encoder = Encoder(message_for(KEY), delay_s=0.1)
    leaver = asyncio.create_task(cache.get_or_encode(KEY, encoder))
    stayer = asyncio.create_task(cache.get_or_encode(KEY, encoder))
    await asyncio.sleep(0.02)
    leaver.cancel()
    assert (await stayer)[0] == encoder.message
    assert encoder.calls == 1 and not encoder.cancelled and leaver.cancelled()


async def test_the_last_caller_leaving_cancels_and_the_next_starts_anew():
    cache, _ = cache_over(InProcessStore(10**6))
    encoder = Encoder(message_for(KEY), delay_s=5)
    leaver = asyncio.create_task(cache.get_or_encode(KEY, encoder))
    await asyncio.sleep(0.02)
    leaver.cancel()
    encoder_after = Encoder(message_for(KEY))
    await asyncio.sleep(0)
    assert (await cache.get_or_encode(KEY, encoder_after))[0] == encoder_after.message
    assert encoder.cancelled == 1 and encoder_after.calls == 1


async def test_a_failed_encoding_reaches_every_waiter_and_is_not_kept():
    cache, _ = cache_over(InProcessStore(10**6))
    broken = Encoder(InvalidInput("is damaged", field="image"), delay_s=0.02)
    results = await asyncio.gather(*(cache.get_or_encode(KEY, broken) for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [InvalidInput] * 3 and broken.calls == 1
    assert not (await cache.get_or_encode(KEY, Encoder(message_for(KEY))))[1]


async def test_in_process_store_is_bounded_in_bytes_and_drops_the_least_recently_used():
    store = InProcessStore(max_bytes=3 * 101)
    for name in "abc":
        await store.put(name, bytes(100))
    await store.get("a")
    await store.put("d", bytes(100))
    assert await store.get("b") is None and await store.get("a") is not None and store.held_bytes == 303
    await store.put("e", bytes(400))  # larger than everything: not kept, nothing dropped for it
    assert await store.get("e") is None and store.held_bytes == 303
    await store.put("a", bytes(10))
    assert store.held_bytes == 303 - 90


async def test_open_store_picks_by_url():
    assert isinstance(open_store(None, 5), InProcessStore)
    store = open_store("redis://127.0.0.1:1/0", 5, timeout_s=2, put_timeout_s=3)
    assert isinstance(store, RedisStore) and (store.timeout_s, store.put_timeout_s) == (2, 3)
    with pytest.raises(StoreFailed):
        await store.get("x")
    await store.close()
