"""CUDA graphs of decode passes: one launch replays a pass's hundreds of kernels.

A graph's shapes are fixed, so batch size and block table width are rounded up to powers of two, and a graph is recorded
the first time that a pair is met.

Legend: n sequences, N sequences of a graph (n or more), L layers of a KV cache group, B blocks of a block table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

DecodePass = Callable[[torch.Tensor, torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]
"""(tokens [n], tokens held before it in each KV cache group [2, n], its block tables [L, n, B]) -> [n, ...], without a
word from the CPU."""
Capture = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], None], torch.Tensor]]
"""Records a call; returns what repeats it on the same memory, and the memory its result comes to lie in."""
LEAST_BLOCKS = 256
"""Of a graph's block tables: 4,096 tokens at 16 a block. Programs of blocks that a sequence does not have end at once,
and one width for nearly all keeps graphs few."""


@dataclass(frozen=True, kw_only=True)
class _Graph:
    tokens_N: torch.Tensor
    held_2N: torch.Tensor
    rows_LNB: tuple[torch.Tensor, ...]
    replay: Callable[[], None]
    out: torch.Tensor


class DecodeGraphs:
    """A decode pass by graphs. Rows that fill a batch up hold token 0 at position 0 of the null row: `run` may write
    K and V there, and must leave it zero."""

    def __init__(self, run: DecodePass, capture: Capture, *, null_row: int):
        self._run, self._capture, self._null_row = run, capture, null_row
        self._graphs: dict[tuple[int, int], _Graph] = {}

    def __call__(self, tokens_n: torch.Tensor, held_2n: torch.Tensor, rows_LnB: Sequence[torch.Tensor]) -> torch.Tensor:
        """See DecodePass. The result is overwritten by the next call."""
        count, blocks = len(tokens_n), max(LEAST_BLOCKS, *(rows.shape[2] for rows in rows_LnB))
        graph = self._graph(round_up(count), round_up(blocks), [len(rows) for rows in rows_LnB], tokens_n.device)
        for static, given in ((graph.tokens_N, tokens_n), (graph.held_2N, held_2n)):
            static.zero_()
            static[..., :count] = given
        for static, given in zip(graph.rows_LNB, rows_LnB, strict=True):
            static.fill_(self._null_row)
            static[:, :count, : given.shape[2]] = given
        graph.replay()
        return graph.out[:count]

    def record(self, most: int, layers: Sequence[int], device: torch.device) -> None:
        """Records the graphs of up to `most` sequences, in block tables of LEAST_BLOCKS, unless they are there."""
        count = round_up(most)
        while count:
            self._graph(count, LEAST_BLOCKS, layers, device)
            count //= 2

    def _graph(self, count: int, blocks: int, layers: Sequence[int], device: torch.device) -> _Graph:
        """Recording runs the pass, on rows that belong to nobody."""
        graph = self._graphs.get((count, blocks))
        if graph is None:
            tokens_N = torch.zeros(count, dtype=torch.int64, device=device)
            held_2N = torch.zeros(2, count, dtype=torch.int64, device=device)
            rows_LNB = tuple(
                torch.full((number, count, blocks), self._null_row, dtype=torch.int64, device=device)
                for number in layers
            )
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
        with torch.cuda.graph(graph, pool=pool):
            out = run()
        return graph.replay, out

    return capture
