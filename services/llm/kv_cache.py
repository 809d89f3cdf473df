"""Paged KV cache in two groups (layers before the prune layer, layers from it on) that share one pool of pages.

Legend: G key heads, d head width, D hidden width. A *page* holds `block_size` tokens for `layers_per_page` layers; a
*block* holds `block_size` tokens for every layer of one group, so it takes several pages. `layers_per_page` divides
both groups' layer counts, so a page freed by either group serves both. A *row* is one page's share of one layer:
[block_size, G, d].

Full blocks of prompt tokens in the lower group are known by a key (prefix.py), and a later prompt with the same
beginning adopts them. The layers above need the hidden states that left the lower group, so beside each lower block
of a prompt lies a *buffer* with them, [block_size, D], from a pool that the same budget pays for. There a split prompt
waits for its upper layers; after its prefill a buffer stays only with a known block. The upper group is never shared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from services.checkpoint.sizing import BLOCK_SIZE
from services.common.errors import InvalidInput
from services.llm.block_pool import Block, BlockPool
from services.llm.engine_config import EngineConfig

LOWER, UPPER = 0, 1


@dataclass(frozen=True, kw_only=True)
class CacheGroup:
    """Layers that hold the same tokens of a sequence."""

    first_layer: int
    num_layers: int


@dataclass(kw_only=True, eq=False)
class BlockTables:
    """The blocks that one sequence holds, one table a group."""

    blocks: tuple[list[Block], list[Block]] = field(default_factory=lambda: ([], []))
    rows: list[torch.Tensor]
    """A group: int64 [layers of the group, blocks], on the cache's device: what attention reads."""
    in_prefill: bool = True


class KVCache:
    """K and V of every sequence. All methods are called from the engine's thread."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        num_layers: int,
        prune_layer: int,
        kv_heads: int,
        head_dim: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        block_size: int = BLOCK_SIZE,
    ):
        """config.kv_cache_bytes pays for pages and buffers together. Raises InvalidInput where it pays for no block."""
        assert config.kv_cache_bytes is not None, "sizes are set"
        kv_cache_bytes = config.kv_cache_bytes
        self.groups = (
            CacheGroup(first_layer=0, num_layers=prune_layer),
            CacheGroup(first_layer=prune_layer, num_layers=num_layers - prune_layer),
        )
        self.block_size, self.prefix_reuse = block_size, config.prefix_reuse
        self.layers_per_page = math.gcd(prune_layer, num_layers - prune_layer)
        self.pages_a_block = tuple(group.num_layers // self.layers_per_page for group in self.groups)
        self.bytes_per_token_layer = 2 * kv_heads * head_dim * dtype.itemsize
        self.page_bytes = self.layers_per_page * block_size * self.bytes_per_token_layer
        # As many buffers as there would be blocks if no token were ever pruned; pages take the rest.
        buffer_bytes = block_size * hidden_size * dtype.itemsize
        self.block_bytes = sum(self.pages_a_block) * self.page_bytes + buffer_bytes
        self.num_buffers = kv_cache_bytes // self.block_bytes
        if not self.num_buffers:
            raise InvalidInput(
                f"is {kv_cache_bytes}, expected {self.block_bytes} or more: a block has {block_size} tokens",
                field="kv_cache_bytes",
            )
        self.num_pages = (kv_cache_bytes - self.num_buffers * buffer_bytes) // self.page_bytes
        self.pool = BlockPool(num_pages=self.num_pages, num_buffers=self.num_buffers)
        # The last page belongs to nobody and stays zero: padded block tables point at it.
        rows = (self.num_pages + 1) * self.layers_per_page
        self.null_row = self.num_pages * self.layers_per_page
        # Written to here: memory that is only promised would look free to the next replica.
        self.key = torch.empty(rows, block_size, kv_heads, head_dim, dtype=dtype, device=device).zero_()
        self.value = torch.empty_like(self.key).zero_()
        self.hidden = torch.empty(self.num_buffers, block_size, hidden_size, dtype=dtype, device=device).zero_()
        self._tables: dict[str, BlockTables] = {}

    # What fits.

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def pages_needed(self, lower_tokens: int, upper_tokens: int) -> int:
        """Pages that hold so many tokens of each group, none of them shared."""
        tokens = (lower_tokens, upper_tokens)
        return sum(self.blocks(count) * pages for count, pages in zip(tokens, self.pages_a_block, strict=True))

    def pages_missing(self, request_id: str, lower_tokens: int, upper_tokens: int) -> int:
        """Pages that a sequence lacks to hold so many tokens of each group."""
        held = [len(blocks) for blocks in self._tables[request_id].blocks]
        wanted = (self.blocks(lower_tokens), self.blocks(upper_tokens))
        return sum(max(0, w - h) * pages for w, h, pages in zip(wanted, held, self.pages_a_block, strict=True))

    def can_open(self, keys: Sequence[bytes], lower_tokens: int, upper_tokens: int, spare_pages: int) -> bool:
        """Whether a new sequence with these keys can hold so many tokens now, and leave spare_pages."""
        found = self.pool.find(keys)
        shared = sum(block.holders > 0 for block in found)  # an idle one is counted as room, so it is needed too
        pages = self.pages_needed(lower_tokens, upper_tokens) - shared * self.pages_a_block[LOWER] + spare_pages
        buffers = self.blocks(lower_tokens) - sum(block.readers > 0 for block in found)
        return pages <= self.pool.pages_to_have and buffers <= self.pool.buffers_to_have

    def can_grow(self, request_id: str, group: int, tokens: int) -> bool:
        """Whether the sequence can hold `tokens` tokens of one group now."""
        table = self._tables[request_id]
        new = self.blocks(tokens) - len(table.blocks[group])
        buffers = new if group == LOWER and table.in_prefill else 0
        pages = new * self.pages_a_block[group]
        return pages <= self.pool.pages_to_have and buffers <= self.pool.buffers_to_have

    # A sequence's way: open, adopt and grow in turns, end_prefill, grow, free.

    def open(self, request_id: str) -> None:
        """A table with no blocks."""
        assert request_id not in self._tables
        empty = [torch.empty(group.num_layers, 0, dtype=torch.int64, device=self.key.device) for group in self.groups]
        self._tables[request_id] = BlockTables(rows=empty)

    def adopt(self, request_id: str, keys: Sequence[bytes]) -> int:
        """Takes the known blocks that go on where the lower table ends; returns the tokens that they hold."""
        table = self._tables[request_id]
        found = self.pool.find(keys[len(table.blocks[LOWER]) :])
        for block in found:
            self.pool.adopt(block)
        self._append(table, LOWER, found)
        return len(found) * self.block_size

    def grow(self, request_id: str, group: int, tokens: int) -> None:
        """Makes room for `tokens` tokens in one group, all of which the coming step fills."""
        assert self.can_grow(request_id, group, tokens)
        table = self._tables[request_id]
        count = self.blocks(tokens) - len(table.blocks[group])
        with_buffer = group == LOWER and table.in_prefill
        self._append(
            table, group, [self.pool.take(self.pages_a_block[group], with_buffer=with_buffer) for _ in range(count)]
        )
        if count > 0 and tokens % self.block_size:
            # A request never reads what another left in the unused end of a block, not even through a masked NaN.
            for pool in (self.key, self.value):
                pool.index_fill_(0, table.rows[group][:, -1], 0)

    def name(self, request_id: str, keys: Sequence[bytes], tokens: int) -> None:
        """Lets later requests find those of the first `tokens` tokens' blocks that are full and have a key."""
        if self.prefix_reuse:
            full = self._tables[request_id].blocks[LOWER][: min(tokens // self.block_size, len(keys))]
            for key, block in zip(keys[: len(full)], full, strict=True):
                self.pool.name(block, key)

    def end_prefill(self, request_id: str) -> None:
        """The upper layers have read the hidden states: buffers of blocks that nobody can find are free."""
        table = self._tables[request_id]
        table.in_prefill = False
        for block in reversed(table.blocks[LOWER]):  # a prefix's end is forgotten before its beginning
            self.pool.stop_reading(block)

    def free(self, request_id: str, *, broken: bool = False) -> None:
        """Gives back everything; a request that holds nothing is fine. broken: nobody may find its blocks any more."""
        table = self._tables.pop(request_id, None)
        if table is not None:
            for group in (UPPER, LOWER):
                reading = group == LOWER and table.in_prefill
                # A prefix's end first: it is of no use without what comes before it, so it is to be evicted before.
                for block in reversed(table.blocks[group]):
                    self.pool.release(block, reading=reading, broken=broken)

    # Where a sequence's tokens are.

    def table(self, request_id: str) -> BlockTables:
        return self._tables[request_id]

    def slots(self, request_id: str, group: int, start: int, end: int) -> torch.Tensor:
        """int64 [layers of the group, end - start]: where tokens start..end-1 live in the flat [., G, d] pools."""
        first = start // self.block_size
        rows = self._tables[request_id].rows[group][:, first : self.blocks(end)]
        slots = rows[:, :, None] * self.block_size + torch.arange(self.block_size, device=rows.device)
        return slots.flatten(1)[:, start - first * self.block_size : end - first * self.block_size]

    def hidden_index(self, request_id: str, index_S: torch.Tensor) -> torch.Tensor:
        """int64 [S], on the cache's device: where tokens index_S (CPU) of a prompt in prefill live in flat `hidden`."""
        table = self._tables[request_id]
        assert table.in_prefill
        buffer_B = torch.tensor([block.buffer for block in table.blocks[LOWER]], dtype=torch.int64)
        place_S = buffer_B[index_S // self.block_size] * self.block_size + index_S % self.block_size
        return place_S.to(self.hidden.device)

    def capacity(self, request_id: str, group: int) -> int:
        """Tokens that the sequence's blocks of one group can hold; 0 when it holds none."""
        table = self._tables.get(request_id)
        return len(table.blocks[group]) * self.block_size if table else 0

    def check_integrity(self, holders: set[str]) -> None:
        """Asserts that only `holders` hold blocks, and that every page and buffer is accounted for (see BlockPool)."""
        assert set(self._tables) == holders, (set(self._tables), holders)
        held: dict[Block, tuple[int, int]] = {}
        for table in self._tables.values():
            for group, blocks in enumerate(table.blocks):
                assert len(blocks) == table.rows[group].shape[1]
                for block in blocks:
                    assert group == LOWER or block not in held and block.key is None, "the upper group is never shared"
                    count, readers = held.get(block, (0, 0))
                    held[block] = count + 1, readers + (group == LOWER and table.in_prefill)
        self.pool.check_integrity(held)

    def _append(self, table: BlockTables, group: int, blocks: list[Block]) -> None:
        if blocks:
            table.blocks[group].extend(blocks)
            pages = torch.tensor([block.pages for block in blocks], dtype=torch.int64)
            rows = pages[:, :, None] * self.layers_per_page + torch.arange(self.layers_per_page)
            table.rows[group] = torch.cat([table.rows[group], rows.flatten(1).t().to(self.key.device)], dim=1)
