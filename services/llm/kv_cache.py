"""Paged KV cache in two groups (layers before the prune layer, layers from it on) that share one pool of pages.

Legend: G key heads, d head width. A *page* holds `block_size` tokens for `layers_per_page` layers; a *block* holds
`block_size` tokens for every layer of one group, so it takes several pages. `layers_per_page` divides both groups'
layer counts, so a page freed by either group serves both. A *row* is one page's share of one layer: [block_size, G, d].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True)
class CacheGroup:
    """Layers that hold the same tokens of a sequence."""

    first_layer: int
    num_layers: int


@dataclass(kw_only=True)
class BlockTables:
    """The blocks that one sequence holds, one table a group."""

    pages: list[torch.Tensor] = field(default_factory=list)
    """A group: int64 [blocks, pages a block], on the CPU."""
    rows: list[torch.Tensor] = field(default_factory=list)
    """A group: int64 [layers of the group, blocks], on the cache's device: what attention reads."""


class KVCache:
    """K and V of every running sequence. All methods are called from the engine's thread."""

    def __init__(
        self,
        *,
        num_layers: int,
        prune_layer: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        kv_cache_bytes: int,
        block_size: int = 16,
    ):
        self.groups = (
            CacheGroup(first_layer=0, num_layers=prune_layer),
            CacheGroup(first_layer=prune_layer, num_layers=num_layers - prune_layer),
        )
        self.block_size = block_size
        self.layers_per_page = math.gcd(prune_layer, num_layers - prune_layer)
        self.bytes_per_token_layer = 2 * kv_heads * head_dim * dtype.itemsize
        self.page_bytes = self.layers_per_page * block_size * self.bytes_per_token_layer
        self.num_pages = kv_cache_bytes // self.page_bytes
        # The last page belongs to nobody and stays zero: padded block tables point at it.
        rows = (self.num_pages + 1) * self.layers_per_page
        self.null_row = self.num_pages * self.layers_per_page
        self.key = torch.zeros(rows, block_size, kv_heads, head_dim, dtype=dtype, device=device)
        self.value = torch.zeros_like(self.key)
        self._free: list[int] = list(range(self.num_pages))
        self._tables: dict[str, BlockTables] = {}

    def group_of(self, layer: int) -> int:
        return int(layer >= self.groups[1].first_layer)

    def pages_needed(self, tokens: int, group: int | None = None) -> int:
        """Pages that hold `tokens` tokens of one group, or of both."""
        blocks = -(-tokens // self.block_size)
        groups = self.groups if group is None else (self.groups[group],)
        return sum(blocks * g.num_layers // self.layers_per_page for g in groups)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def can_allocate(self, tokens: int) -> bool:
        """Whether both groups can hold `tokens` tokens of a new sequence now."""
        return self.pages_needed(tokens) <= len(self._free)

    def allocate(self, request_id: str, tokens: int) -> None:
        """Takes zeroed pages for `tokens` tokens in both groups."""
        assert request_id not in self._tables and self.can_allocate(tokens)
        tables = BlockTables()
        for group, spec in enumerate(self.groups):
            count = self.pages_needed(tokens, group)
            taken = torch.tensor(self._free[len(self._free) - count :], dtype=torch.int64)
            del self._free[len(self._free) - count :]
            table = taken.view(-1, spec.num_layers // self.layers_per_page)
            layers = torch.arange(spec.num_layers)
            rows = table[:, layers // self.layers_per_page] * self.layers_per_page + layers % self.layers_per_page
            tables.pages.append(table)
            tables.rows.append(rows.t().contiguous().to(self.key.device))
            # A request never reads what another left in the unused end of a block, not even through a masked NaN.
            for pool in (self.key, self.value):
                pool.index_fill_(0, tables.rows[group].flatten(), 0)
        self._tables[request_id] = tables

    def trim(self, request_id: str, group: int, tokens: int) -> None:
        """Gives back the blocks of one group beyond `tokens` tokens."""
        tables, blocks = self._tables[request_id], -(-tokens // self.block_size)
        assert blocks <= len(tables.pages[group])
        self._free += tables.pages[group][blocks:].flatten().tolist()
        tables.pages[group] = tables.pages[group][:blocks]
        tables.rows[group] = tables.rows[group][:, :blocks].contiguous()

    def free(self, request_id: str) -> None:
        """Gives back everything; a request that holds nothing is fine."""
        tables = self._tables.pop(request_id, None)
        for table in tables.pages if tables else ():
            self._free += table.flatten().tolist()

    def rows(self, request_id: str, group: int) -> torch.Tensor:
        """int64 [layers of the group, blocks]: the sequence's rows of `key` and `value`."""
        return self._tables[request_id].rows[group]

    def slots(self, request_id: str, group: int, tokens: int) -> torch.Tensor:
        """int64 [layers of the group, tokens]: where tokens 0..tokens-1 live in the flat [slots, G, d] cache."""
        rows = self.rows(request_id, group)[:, : -(-tokens // self.block_size)]
        slots = rows[:, :, None] * self.block_size + torch.arange(self.block_size, device=rows.device)
        return slots.flatten(1)[:, :tokens]

    def capacity(self, request_id: str, group: int) -> int:
        """Tokens that the sequence's blocks of one group can hold; 0 when it holds none."""
        tables = self._tables.get(request_id)
        return len(tables.pages[group]) * self.block_size if tables else 0

    def check_integrity(self, holders: set[str]) -> None:
        """Asserts that every page is free or held exactly once, and held only by `holders`."""
        assert set(self._tables) == holders, (set(self._tables), holders)
        held = [page for tables in self._tables.values() for table in tables.pages for page in table.flatten().tolist()]
        assert sorted(held + self._free) == list(range(self.num_pages)), "a page is lost, or held twice"
