"""The paged KV cache: every page and buffer accounted for, both groups served by one pool, full blocks shared."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from services.common.errors import InvalidInput
from services.llm.engine_config import EngineConfig
from services.llm.kv_cache import LOWER, UPPER, KVCache
from tests import tiny_llm


def make(layers: int = 6, prune_layer: int = 2, blocks: float = 20, block_size: int = 4, **options: bool) -> KVCache:
    """A KV cache with room for so many blocks of unpruned tokens."""

    def build(kv_cache_bytes: int) -> KVCache:
        return KVCache(
            EngineConfig(kv_cache_bytes=kv_cache_bytes, **options),
            num_layers=layers,
            prune_layer=prune_layer,
            kv_heads=2,
            head_dim=8,
            hidden_size=32,
            dtype=torch.float32,
            device="cpu",
            block_size=block_size,
        )

    return build(int(blocks * build(2**20).block_bytes))


def test_a_budget_below_one_block_is_refused_with_the_bytes_of_a_block() -> None:
    assert make(blocks=1).num_buffers == 1
    block_bytes = make().block_bytes
    with pytest.raises(InvalidInput, match=rf"kv_cache_bytes: is {block_bytes // 2}, expected {block_bytes} or more"):
        make(blocks=0.5)
    with pytest.raises(InvalidInput, match="kv_cache_bytes: is 1000, expected "):
        tiny_llm.engine(kv_cache_bytes=1000)


def prefill(cache: KVCache, name: str, lower: int, upper: int, keys: list[bytes] | None = None) -> int:
    """Goes the way of one sequence's prefill; returns the tokens that it adopted."""
    cache.open(name)
    adopted = cache.adopt(name, keys or [])
    cache.grow(name, LOWER, lower)
    cache.name(name, keys or [], lower)
    cache.grow(name, UPPER, upper)
    cache.end_prefill(name)
    return adopted


def keys_of(*names: str) -> list[bytes]:
    return [name.encode() for name in names]


@pytest.mark.parametrize(
    ("layers", "prune_layer", "per_page"), [(6, 2, 2), (32, 8, 8), (7, 3, 1), (12, 6, 6), (28, 8, 4)]
)
def test_pages_divide_both_groups_and_the_budget_pays_for_buffers_too(
    layers: int, prune_layer: int, per_page: int
) -> None:
    cache = make(layers, prune_layer)
    assert cache.layers_per_page == per_page
    assert cache.page_bytes == per_page * 4 * 2 * 2 * 8 * 4
    assert cache.block_bytes == layers * 4 * 2 * 2 * 8 * 4 + 4 * 32 * 4
    assert (cache.num_buffers, cache.num_pages) == (20, 20 * layers // per_page)
    assert cache.pages_needed(4, 4) == layers // per_page
    assert cache.pages_needed(5, 0) == 2 * prune_layer // per_page
    assert cache.pages_needed(0, 5) == 2 * (layers - prune_layer) // per_page
    held = sum(pool[: cache.null_row].nbytes for pool in (cache.key, cache.value)) + cache.hidden.nbytes
    assert held == 20 * cache.block_bytes


@pytest.mark.parametrize(("layers", "prune_layer"), [(6, 2), (7, 3), (8, 4), (5, 1)])
def test_every_token_of_every_layer_has_a_place_of_its_own(layers: int, prune_layer: int) -> None:
    cache = make(layers, prune_layer)
    lengths = {"a": (9, 9), "b": (4, 2), "c": (17, 5)}
    for name in lengths:
        cache.open(name)
    for part in (2, 1):  # taken in turns, in two goes
        for name, tokens in lengths.items():
            for group in (LOWER, UPPER):
                cache.grow(name, group, tokens[group] // part)
    seen: set[int] = set()
    for name, tokens in lengths.items():
        for group, spec in enumerate(cache.groups):
            slots = cache.slots(name, group, 0, tokens[group])
            assert slots.shape == (spec.num_layers, tokens[group])
            assert torch.equal(slots[:, 1:], cache.slots(name, group, 1, tokens[group]))
            seen |= set(slots.flatten().tolist())
    assert len(seen) == sum(a * prune_layer + b * (layers - prune_layer) for a, b in lengths.values())
    assert max(seen) < cache.null_row * cache.block_size, "the null page is nobody's"
    hidden = [cache.hidden_index(name, torch.arange(tokens[0])) for name, tokens in lengths.items()]
    assert len(set(torch.cat(hidden).tolist())) == 30
    cache.check_integrity(set(lengths))


def test_pages_freed_by_either_group_serve_the_other() -> None:
    cache = make(blocks=10)  # 30 pages: 1 a lower block, 2 an upper one
    prefill(cache, "a", 40, 12)
    assert cache.pool.free_pages == 30 - 10 - 6 and cache.pages_missing("a", 41, 16) == 1 + 2
    cache.open("b")
    assert cache.can_grow("b", UPPER, 28) and not cache.can_grow("b", UPPER, 29)
    cache.grow("b", UPPER, 28)
    assert not cache.can_grow("a", LOWER, 41)
    cache.free("b")
    assert cache.can_grow("a", LOWER, 40 + 4 * 14) and not cache.can_grow("a", LOWER, 40 + 4 * 14 + 1)
    cache.free("a")
    cache.free("a")
    cache.check_integrity(set())
    assert cache.pool.free_pages == 30


def test_a_tokens_place_stays_while_the_table_grows() -> None:
    cache = make()
    cache.open("a")
    cache.grow("a", UPPER, 10)
    before = cache.slots("a", UPPER, 0, 10)
    cache.grow("a", UPPER, 40)
    assert torch.equal(cache.slots("a", UPPER, 0, 10), before)


def test_the_unfilled_end_of_a_block_is_zero_and_the_null_page_always_is() -> None:
    cache = make()
    prefill(cache, "a", 40, 40)
    for pool in (cache.key, cache.value):
        pool[: cache.null_row].fill_(float("nan"))
    cache.free("a")
    prefill(cache, "b", 30, 29)
    for group in (LOWER, UPPER):
        rows = cache.table("b").rows[group][:, -1]
        assert not cache.key[rows].any() and not cache.value[rows].any()
    assert not cache.key[cache.null_row :].any() and not cache.value[cache.null_row :].any()


def test_known_blocks_are_shared_stay_when_idle_and_are_found_up_to_the_first_difference() -> None:
    cache = make()
    assert prefill(cache, "a", 14, 6, keys_of("1", "2", "3")) == 0
    assert prefill(cache, "b", 14, 6, keys_of("1", "2", "x")) == 8
    assert torch.equal(cache.slots("a", LOWER, 0, 8), cache.slots("b", LOWER, 0, 8))
    cache.check_integrity({"a", "b"})
    used = cache.num_pages - cache.pool.free_pages
    assert used == cache.pages_needed(14, 6) * 2 - 2
    cache.free("a")
    assert cache.pool.idle_pages == 1, "b still holds the other two"
    cache.free("b")
    cache.check_integrity(set())
    assert cache.pool.free_pages + cache.pool.idle_pages == cache.num_pages and cache.pool.idle_pages == 4
    assert prefill(cache, "c", 12, 4, keys_of("1", "2", "3")) == 12
    assert prefill(cache, "d", 12, 4, keys_of("2", "3")) == 8, "keys chain where they are made, not here"
    assert prefill(make(prefix_reuse=False), "e", 12, 4, keys_of("1")) == 0


def test_eviction_takes_the_least_recently_used_and_the_end_of_a_prefix_first() -> None:
    cache = make(blocks=10)
    for name in "abc":
        prefill(cache, name, 8, 4, keys_of(f"{name}1", f"{name}2"))
        cache.free(name)
    assert prefill(cache, "again", 8, 4, keys_of("a1", "a2")) == 8
    cache.free("again")
    # 10 buffers: 6 hold known blocks, 4 are free; this needs 3 of those: b2, then b1, then c2.
    prefill(cache, "new", 28, 4)
    found = {name: len(cache.pool.find(keys_of(f"{name}1", f"{name}2"))) for name in "abc"}
    assert found == {"a": 2, "b": 0, "c": 1}
    cache.check_integrity({"new"})


def test_a_buffer_is_taken_from_a_running_sequence_when_no_other_is_left_but_never_from_a_prefill() -> None:
    cache = make(blocks=4)
    prefill(cache, "runs", 12, 0, keys_of("1", "2", "3"))
    cache.open("b")
    assert cache.can_grow("b", LOWER, 16)
    cache.grow("b", LOWER, 8)
    cache.check_integrity({"runs", "b"})
    assert len(cache.pool.find(keys_of("1", "2", "3"))) == 2, "3 went first: 1 and 2 are of use without it"
    assert cache.capacity("runs", LOWER) == 12
    cache.grow("b", LOWER, 16)
    cache.open("c")
    assert not cache.can_grow("c", LOWER, 1), "every buffer is read"
    assert cache.can_grow("c", UPPER, 4)
    assert not cache.can_open([], 1, 1, 0)
    cache.end_prefill("b")
    assert cache.can_open([], 1, 1, 0)


def test_a_broken_sequence_leaves_nothing_to_find() -> None:
    cache = make()
    prefill(cache, "a", 8, 4, keys_of("1", "2"))
    prefill(cache, "b", 8, 4, keys_of("1", "2"))
    cache.free("b", broken=True)
    cache.check_integrity({"a"})
    assert not cache.pool.find(keys_of("1"))
    cache.free("a")
    cache.check_integrity(set())
    assert (cache.pool.idle_pages, cache.pool.free_pages) == (0, cache.num_pages)


def _lose_a_page(cache: KVCache) -> None:
    cache.pool._free.pop()


def _double_a_page(cache: KVCache) -> None:
    cache.pool._free.append(cache.pool._free[0])


def _lose_a_buffer(cache: KVCache) -> None:
    cache.pool._free_buffers.pop()


def _miscount(cache: KVCache) -> None:
    cache.table("a").blocks[LOWER][0].holders += 1


def _misread(cache: KVCache) -> None:
    cache.table("a").blocks[LOWER][0].readers += 1


def _forget_that_nobody_reads(cache: KVCache) -> None:
    cache.pool._unread.popitem()


def _share_above(cache: KVCache) -> None:
    cache.open("x")
    cache.table("x").blocks[UPPER].extend(cache.table("a").blocks[UPPER])
    cache.table("x").rows[UPPER] = cache.table("a").rows[UPPER]


@pytest.mark.parametrize(
    "spoil",
    [
        _lose_a_page, _double_a_page, _lose_a_buffer, _miscount, _misread, _forget_that_nobody_reads, _share_above,
        lambda c: c.open("x"),
    ],
)  # fmt: skip
def test_integrity_check_finds_what_is_wrong(spoil: Callable[[KVCache], None]) -> None:
    cache = make()
    prefill(cache, "a", 8, 8, keys_of("1", "2"))
    cache.check_integrity({"a"})
    spoil(cache)
    with pytest.raises(AssertionError):
        cache.check_integrity({"a"} | ({"x"} if spoil is _share_above else set()))
