"""The paged KV cache: every page accounted for, both groups served by one pool."""

from __future__ import annotations

import pytest
import torch

from services.llm.kv_cache import KVCache


def make(layers: int = 6, prune_layer: int = 2, pages: int = 60, block_size: int = 4) -> KVCache:
    probe = {"kv_heads": 2, "head_dim": 8, "dtype": torch.float32, "device": "cpu", "block_size": block_size}
    page_bytes = KVCache(num_layers=layers, prune_layer=prune_layer, kv_cache_bytes=0, **probe).page_bytes
    return KVCache(num_layers=layers, prune_layer=prune_layer, kv_cache_bytes=pages * page_bytes + 1, **probe)


@pytest.mark.parametrize(
    ("layers", "prune_layer", "per_page"), [(6, 2, 2), (32, 8, 8), (7, 3, 1), (12, 6, 6), (28, 8, 4)]
)
def test_pages_divide_both_groups(layers: int, prune_layer: int, per_page: int) -> None:
    cache = make(layers, prune_layer)
    assert cache.layers_per_page == per_page
    assert cache.page_bytes == per_page * 4 * 2 * 2 * 8 * 4
    assert cache.num_pages == 60
    assert cache.pages_needed(4) == layers // per_page
    assert cache.pages_needed(5, 0) == 2 * prune_layer // per_page
    assert cache.pages_needed(5, 1) == 2 * (layers - prune_layer) // per_page


@pytest.mark.parametrize(("layers", "prune_layer"), [(6, 2), (7, 3), (8, 4), (5, 1)])
def test_every_token_of_every_layer_has_a_slot_of_its_own(layers: int, prune_layer: int) -> None:
    cache = make(layers, prune_layer, pages=200)
    lengths = {"a": 9, "b": 4, "c": 17}
    for name, tokens in lengths.items():
        cache.allocate(name, tokens)
    seen: set[int] = set()
    for name, tokens in lengths.items():
        for group, spec in enumerate(cache.groups):
            slots = cache.slots(name, group, tokens)
            assert slots.shape == (spec.num_layers, tokens)
            seen |= set(slots.flatten().tolist())
    assert len(seen) == sum(lengths.values()) * layers
    assert max(seen) < cache.null_row * cache.block_size, "the null page is nobody's"


def test_trimmed_and_freed_pages_serve_either_group() -> None:
    cache = make(pages=60)
    cache.allocate("a", 40)  # 10 blocks: 10 pages of the first group, 20 of the second
    cache.allocate("b", 40)
    assert cache.free_pages == 0 and not cache.can_allocate(1)
    cache.trim("a", 1, 9)  # 3 of 10 blocks stay
    cache.check_integrity({"a", "b"})
    assert (cache.free_pages, cache.capacity("a", 0), cache.capacity("a", 1)) == (14, 40, 12)
    assert cache.can_allocate(16) and not cache.can_allocate(17)
    cache.allocate("c", 16)
    cache.free("b")
    cache.check_integrity({"a", "c"})
    cache.free("a")
    cache.free("c")
    cache.free("c")
    cache.check_integrity(set())
    assert cache.free_pages == 60


def test_slots_do_not_move_when_the_end_is_trimmed() -> None:
    cache = make()
    cache.allocate("a", 40)
    before = cache.slots("a", 1, 10)
    cache.trim("a", 1, 10)
    assert torch.equal(cache.slots("a", 1, 10), before)


def test_pages_are_zero_when_taken_and_the_null_page_always_is() -> None:
    cache = make()
    cache.allocate("a", 40)
    for group in range(2):
        for pool in (cache.key, cache.value):
            pool.flatten(0, 1)[cache.slots("a", group, 40).flatten()] = float("nan")
    cache.free("a")
    cache.allocate("b", 30)
    for group in range(2):
        rows = cache.rows("b", group).flatten()
        assert not cache.key[rows].any() and not cache.value[rows].any()
    assert not cache.key[cache.null_row :].any() and not cache.value[cache.null_row :].any()


def test_integrity_check_finds_a_lost_a_doubled_and_an_ownerless_page() -> None:
    for spoil in (lambda c: c._free.pop(), lambda c: c._free.append(c._free[0]), lambda c: c.allocate("x", 1)):
        cache = make()
        cache.allocate("a", 8)
        spoil(cache)
        with pytest.raises(AssertionError):
            cache.check_integrity({"a"})
