"""Packed attention over the paged KV cache, registered with transformers under the name "focusllava".

Legend: H query heads, G key heads, d head width, S tokens of a packed step (first one token of each of n sequences that
decode, then prefill chunks end to end, no padding), K keys of all chunks, B blocks, L layers of a KV cache group.
The step reaches the function below as the layers' keyword argument `focus_step`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from services.compute.panel_linear import FEW_TOKENS
from services.llm.kernels import AttentionStep, Kernels
from services.llm.kernels.cpu_attention import CpuKernels
from services.llm.kv_cache import BlockTables, KVCache
from services.llm.scheduler import Chunk

ATTENTION_NAME = "focusllava"
SPARE_BLOCKS = 8


class DecodeBatch:
    """Padded block tables of the sequences that decode; while the batch stays, only new blocks are added."""

    def __init__(self, cache: KVCache):
        self.cache = cache
        self._tables: list[BlockTables] = []
        self._filled: tuple[list[int], list[int]] = ([], [])
        self._rows_LnB: list[torch.Tensor] = []

    def rows(self, request_ids: Sequence[str]) -> list[torch.Tensor]:
        """One table a KV cache group: int64 [L, n, B], padded with the null row."""
        tables = [self.cache.table(request_id) for request_id in request_ids]
        # BlockTables compare by identity: a sequence that was preempted in between has another one.
        if tables != self._tables or any(
            len(table.blocks[group]) > rows_LnB.shape[2] for table in tables for group, rows_LnB in self._groups()
        ):
            self._tables, self._filled = tables, ([0] * len(tables), [0] * len(tables))
            self._rows_LnB = [
                torch.full(
                    (spec.num_layers, len(tables), SPARE_BLOCKS + max(len(table.blocks[group]) for table in tables)),
                    self.cache.null_row,
                    device=self.cache.key.device,
                )
                for group, spec in enumerate(self.cache.groups)
            ]
        for group, rows_LnB in self._groups():
            filled = self._filled[group]
            for index, table in enumerate(tables):
                blocks = len(table.blocks[group])
                if blocks > filled[index]:
                    rows_LnB[:, index, filled[index] : blocks] = table.rows[group][:, filled[index] :]
                    filled[index] = blocks
        return self._rows_LnB

    def most_blocks(self, context: int) -> int:
        """The widest that `rows` can be, for a model of so many tokens of context."""
        # A request needs a buffer of hidden states a block.
        return min(self.cache.blocks(context), self.cache.num_buffers) + SPARE_BLOCKS

    def _groups(self) -> list[tuple[int, torch.Tensor]]:
        return list(enumerate(self._rows_LnB))


class PackedStep:
    """Decoding tokens and prefill chunks through one KV cache group."""

    def __init__(
        self,
        cache: KVCache,
        kernels: Kernels,
        group: int,
        *,
        rows_LnB: torch.Tensor | None = None,
        lengths_n: torch.Tensor | None = None,
        chunks: Sequence[Chunk] = (),
        last_rows: Sequence[bool] | None = None,
    ):
        """rows_LnB: block tables of the n decoding sequences; lengths_n: int64 tokens of each, the new one included.

        last_rows: of which chunks the last row is read after the model's last layer; None: every row of every chunk.
        """
        self.cache, self.kernels = cache, kernels
        self.first_layer = cache.groups[group].first_layer
        self.pools = cache.key.flatten(0, 1), cache.value.flatten(0, 1)  # [slots, G, d]
        self.rows_LnB, self.lengths_n = rows_LnB, lengths_n
        self.decoding = 0
        slots = []
        if rows_LnB is not None and lengths_n is not None:
            self.decoding = len(lengths_n)
            last_n = lengths_n - 1
            block_Ln1 = (last_n // cache.block_size).expand(rows_LnB.shape[0], -1)[:, :, None]
            slots.append(rows_LnB.gather(2, block_Ln1).squeeze(2) * cache.block_size + last_n % cache.block_size)
        self.query_lens = [chunk.count for chunk in chunks]
        self.key_lens = [chunk.start + chunk.count for chunk in chunks]
        self.final_rows: torch.Tensor | None = None
        if last_rows is not None:
            ends = list(itertools.accumulate(self.query_lens, initial=self.decoding))[1:]
            read = [end - 1 for end, wanted in zip(ends, last_rows, strict=True) if wanted]
            self.final_rows = torch.tensor([*range(self.decoding), *read], dtype=torch.int64, device=cache.key.device)
            self.final_query_lens = [int(wanted) for wanted in last_rows]
        ids = [chunk.sequence.request_id for chunk in chunks]
        slots += [cache.slots(i, group, c.start, c.start + c.count) for i, c in zip(ids, chunks, strict=True)]
        self.slots_S = torch.cat(slots, dim=1).unbind()  # one a layer
        self.key_slots_K = None  # chunks without a past need not read back what they have just computed
        if self.query_lens != self.key_lens:
            past = [cache.slots(i, group, 0, length) for i, length in zip(ids, self.key_lens, strict=True)]
            self.key_slots_K = torch.cat(past, dim=1).unbind()

    @property
    def decodes_few(self) -> bool:
        """Whether the step, on a CPU, only decodes, and no more tokens than the panels' own products are for."""
        return isinstance(self.kernels, CpuKernels) and not self.query_lens and self.decoding <= FEW_TOKENS

    def pages(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a step that only decodes reads: both pools, each token's slot in them, block tables and lengths."""
        assert self.rows_LnB is not None and self.lengths_n is not None
        local = layer - self.first_layer
        return self.cache.key, self.cache.value, self.slots_S[local], self.rows_LnB[local], self.lengths_n

    def attend(
        self, layer: int, query_SHd: torch.Tensor, key_SGd: torch.Tensor, value_SGd: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """See AttentionStep."""
        local, n, cache = layer - self.first_layer, self.decoding, self.cache
        # All is stored before any is read: a chunk may read what another chunk of this step brings.
        self.kernels.store(key_SGd, value_SGd, cache.key, cache.value, self.slots_S[local])
        outputs = []
        if n:
            assert self.rows_LnB is not None and self.lengths_n is not None
            outputs.append(
                self.kernels.decode(
                    query_SHd[:n], cache.key, cache.value, self.rows_LnB[local], self.lengths_n, scaling
                )
            )
        all_rows = len(query_SHd) == len(key_SGd)
        query_lens = self.query_lens if all_rows else self.final_query_lens
        if query_lens and len(query_SHd) > n:
            key_KGd, value_KGd = key_SGd[n:], value_SGd[n:]
            if self.key_slots_K is not None:
                key_KGd, value_KGd = (pool.index_select(0, self.key_slots_K[local]) for pool in self.pools)
            outputs.append(self.kernels.prefill(query_SHd[n:], key_KGd, value_KGd, query_lens, self.key_lens, scaling))
        return torch.cat(outputs) if len(outputs) > 1 else next(iter(outputs), query_SHd)


def focus_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    focus_step: AttentionStep,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, H, S, d], key and value [1, G, S, d] -> ([1, S, H, d], None)."""
    assert attention_mask is None and query.shape[0] == 1
    layer: int = module.layer_idx  # type: ignore[assignment]
    query_SHd, key_SGd, value_SGd = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return focus_step.attend(layer, query_SHd, key_SGd, value_SGd, scaling)[None], None


AttentionInterface.register(ATTENTION_NAME, focus_attention)
