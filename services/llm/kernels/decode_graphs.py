"""CUDA graphs of decode passes: one launch replays a pass's hundreds of kernels.

A graph's shapes are fixed, so batch size and block table width are rounded up to powers of two. A replica records every
pair that it can meet before its first request (`DecodeGraphs.record`); elsewhere a graph is recorded the first time
that its pair is met.

Legend: n sequences, N sequences of a graph (n or more), L layers of a KV cache group, B blocks of a block table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

DecodePass = Callable[[torch.Tensor, torch.Tensor, list[torch.Tensor]], torch.Tensor]
"""(tokens [n], tokens held before it in each KV cache group [2, n], its block tables [L, n, B]) -> [n, ...], without a
word from the CPU."""
Capture = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], None], torch.Tensor]]
"""Records a call; returns what repeats it on the same memory, and the memory its result comes to lie in."""
LEAST_BLOCKS = 256
"""Least width of a graph's block tables: 4,096 tokens at 16 a block. Programs of blocks that a sequence does not have
end at once, and one width for nearly all keeps graphs few."""


@dataclass(frozen=True, kw_only=True)
class _Graph:
    tokens_N: torch.Tensor
    held_2N: torch.Tensor
    rows_LNB: list[torch.Tensor]
    replay: Callable[[], None]
    out: torch.Tensor


class DecodeGraphs:
    """A decode pass by graphs. Rows that fill a batch up hold token 0 at position 0 of the null row: `run` may write
    K and V there, and must leave it zero."""

    def __init__(self, run: DecodePass, capture: Capture, *, null_row: int):
        self._run, self._capture, self._null_row = run, capture, null_row
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._most_blocks: int | None = None  # once all are recorded

    def __call__(self, tokens_n: torch.Tensor, held_2n: torch.Tensor, rows_LnB: list[torch.Tensor]) -> torch.Tensor:
        """See DecodePass. The result is overwritten by the next call."""
        count, blocks = len(tokens_n), max(rows.shape[2] for rows in rows_LnB)
        shape = round_up(count), self._width(blocks)
        if self._most_blocks is not None and shape not in self._graphs:
            return self._run(tokens_n, held_2n, rows_LnB)  # recording would hold live requests up
        graph = self._graph(*shape, [len(rows) for rows in rows_LnB], tokens_n.device)
        for static, given in ((graph.tokens_N, tokens_n), (graph.held_2N, held_2n)):
            static.zero_()
            static[..., :count] = given
        for static, given in zip(graph.rows_LNB, rows_LnB, strict=True):
            static.fill_(self._null_row)
            static[:, :count, : given.shape[2]] = given
        graph.replay()
        return graph.out[:count]

    def record(self, most: int, blocks: int, layers: Sequence[int], device: torch.device) -> None:
        """Records the graphs of up to `most` sequences in block tables of up to `blocks`, and from then on none: a pass
        that fits none of them runs without."""
        self._most_blocks = max(blocks, LEAST_BLOCKS)
        widths = {self._most_blocks}
        while blocks > LEAST_BLOCKS:
            blocks = round_up(blocks) // 2
            widths.add(blocks)
        for width in sorted(widths, reverse=True):  # the largest first: the others fit in its memory
            count = round_up(most)
            while count:
                self._graph(count, width, layers, device)
                count //= 2

    def _width(self, blocks: int) -> int:
        """The width of the graph's block tables for tables of so many blocks."""
        width = round_up(max(blocks, LEAST_BLOCKS))
        return width if self._most_blocks is None or blocks > self._most_blocks else min(width, self._most_blocks)

    def _graph(self, count: int, blocks: int, layers: Sequence[int], device: torch.device) -> _Graph:
        """Recording runs the pass, on rows that belong to nobody."""
        graph = self._graphs.get((count, blocks))
        if graph is None:
            tokens_N = torch.zeros(count, dtype=torch.int64, device=device)
            held_2N = torch.zeros(2, count, dtype=torch.int64, device=device)
            rows_LNB = [
                torch.full((number, count, blocks), self._null_row, dtype=torch.int64, device=device)
                for number in layers
            ]
            replay, out = self._capture(lambda: self._run(tokens_N, held_2N, rows_LNB))
            graph = _Graph(tokens_N=tokens_N, held_2N=held_2N, rows_LNB=rows_LNB, replay=replay, out=out)
            self._graphs[count, blocks] = graph
        return graph


def round_up(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


def cuda_capture() -> Capture:  # GPU only
    """Records CUDA graphs. They share one pool of memory, for none runs beside another: what a graph returns is read
    before the next one replays."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        stream = torch.cuda.Stream()  # a warm-up on a stream of its own, as recording requires
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the replica pin memory meanwhile, which a capture of the whole process would not outlive.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            out = run()
        return graph.replay, out

    return capture
