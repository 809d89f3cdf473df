"""Pages and hidden-state buffers of the KV cache: who holds which, and what a later request may still find.

A *block* takes pages, and while somebody may need the hidden states of its tokens, a *buffer*. A block with a key is
*known*: later prompts find and share it. A known block that no sequence holds is *idle*: it stays until its pages or
its buffer are needed, the least recently used first. One that sequences hold and none of them reads is *unread*: where
no block is idle it is forgotten for its buffer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(kw_only=True, eq=False)
class Block:
    pages: list[int]
    buffer: int | None = None
    """The buffer that holds the hidden states of its tokens; lower group only."""
    key: bytes | None = None
    """Set while later requests may find it; it has a buffer then."""
    holders: int = 1
    readers: int = 0
    """Holders that are in prefill: they need the buffer."""


class BlockPool:
    """Plain bookkeeping: no tensor is touched here."""

    def __init__(self, *, num_pages: int, num_buffers: int):
        self.num_pages, self.num_buffers = num_pages, num_buffers
        self._free = list(range(num_pages))
        self._free_buffers = list(range(num_buffers))
        self._read_buffers = 0  # buffers with readers
        self.idle_pages = 0
        """Pages of blocks that no sequence holds and a later one may find."""
        self._known: dict[bytes, Block] = {}
        # OrderedDict finds its first at once; dict goes over all that was taken before it.
        self._idle: OrderedDict[bytes, Block] = OrderedDict()
        self._unread: OrderedDict[bytes, Block] = OrderedDict()

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def pages_to_have(self) -> int:
        """Pages that are free or idle."""
        return self.free_pages + self.idle_pages

    @property
    def buffers_to_have(self) -> int:
        """Buffers that are free or that nobody reads."""
        return self.num_buffers - self._read_buffers

    def take(self, pages: int, *, with_buffer: bool = False) -> Block:
        """A new block for one holder; with_buffer: which reads it. There must be room, idle blocks counted."""
        while len(self._free) < pages:
            self._forget(next(iter(self._idle.values())))
        block = Block(pages=self._free[-pages:])
        del self._free[-pages:]
        if with_buffer:
            if not self._free_buffers:
                self._forget(next(iter((self._idle or self._unread).values())))
            block.buffer = self._free_buffers.pop()
            self._add_reader(block)
        return block

    def find(self, keys: Sequence[bytes]) -> list[Block]:
        """The known blocks of the longest beginning of `keys`."""
        found = []
        for key in keys:
            block = self._known.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def adopt(self, block: Block) -> None:
        """One more holder of a known block, which reads it."""
        assert block.key is not None
        self._pick(block)
        block.holders += 1
        self._add_reader(block)

    def name(self, block: Block, key: bytes) -> None:
        """Lets later prompts find the block, unless they find an equal one already."""
        if block.key is None and key not in self._known:
            assert block.buffer is not None
            block.key = key
            self._known[key] = block

    def stop_reading(self, block: Block) -> None:
        """A holder is through with its prefill."""
        self._remove_reader(block)
        self._settle(block)

    def release(self, block: Block, *, reading: bool, broken: bool) -> None:
        """One holder less. broken: what the block holds may be wrong, nobody may find it any more."""
        block.holders -= 1
        if reading:
            self._remove_reader(block)
        if broken and block.key is not None:
            self._forget(block)
        else:
            self._settle(block)

    def check_integrity(self, held: dict[Block, tuple[int, int]]) -> None:
        """Asserts that every page and buffer is free or has one block; held: holders and readers of each block."""
        blocks = dict.fromkeys([*self._known.values(), *held])
        assert all((b.holders, b.readers) == held.get(b, (0, 0)) for b in blocks), "a block is counted wrong"
        assert self._idle == {key: b for key, b in self._known.items() if not b.holders}
        assert self._unread == {key: b for key, b in self._known.items() if b.holders and not b.readers}
        assert self.idle_pages == sum(len(b.pages) for b in self._idle.values())
        assert all(b.key == key for key, b in self._known.items())
        assert all(b.key is None or self._known[b.key] is b for b in blocks)
        pages = [page for b in blocks for page in b.pages]
        assert sorted(pages + self._free) == list(range(self.num_pages)), "a page is lost, or held twice"
        buffers = [b.buffer for b in blocks if b.buffer is not None]
        assert sorted(buffers + self._free_buffers) == list(range(self.num_buffers)), "a buffer is lost, or held twice"
        assert all((b.buffer is not None) == bool(b.readers or b.key) for b in blocks)
        assert self._read_buffers == sum(b.readers > 0 for b in blocks)

    def _add_reader(self, block: Block) -> None:
        block.readers += 1
        self._read_buffers += block.readers == 1

    def _remove_reader(self, block: Block) -> None:
        block.readers -= 1
        self._read_buffers -= block.readers == 0

    def _settle(self, block: Block) -> None:
        """Frees the parts of a block that nobody needs any more; a known one keeps them, and may be idle or unread."""
        if block.key is not None:
            if not block.holders:
                self._unread.pop(block.key, None)
                self._idle[block.key] = block
                self.idle_pages += len(block.pages)
            elif not block.readers:
                self._unread[block.key] = block
            return
        if block.buffer is not None and not block.readers:
            self._free_buffers.append(block.buffer)
            block.buffer = None
        if not block.holders:
            self._free += block.pages

    def _forget(self, block: Block) -> None:
        """Takes the block's key away, so that no later request finds it."""
        assert block.key is not None
        del self._known[block.key]
        self._pick(block)
        block.key = None
        self._settle(block)

    def _pick(self, block: Block) -> None:
        """Takes a known block out of the idle and the unread ones."""
        assert block.key is not None
        self._unread.pop(block.key, None)
        if self._idle.pop(block.key, None):
            self.idle_pages -= len(block.pages)
