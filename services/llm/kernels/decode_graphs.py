"""CUDA graphs of decode passes: one launch replays a pass's hundreds of kernels.

A graph's shapes are fixed, so batch size and block table width are rounded up to powers of two, and a graph is recorded
the first time that a pair is met.

Legend: n sequences, N sequences of a graph (n or more), L layers, B blocks of a block table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

DecodePass = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(tokens [n] or hidden states [n, D], position_n, lengths_n, rows_LnB) -> [n, ...], without a word from the CPU."""
Capture = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], None], torch.Tensor]]
"""Records a call; returns what repeats it on the same memory, and the memory its result comes to lie in."""


@dataclass(frozen=True, kw_only=True)
class _Graph:
    tokens: torch.Tensor
    position_N: torch.Tensor
    lengths_N: torch.Tensor
    rows_LNB: torch.Tensor
    replay: Callable[[], None]
    out: torch.Tensor


class DecodeGraphs:
    """A decode pass by graphs. Rows that fill a batch up hold token 0 at position 0 of the null row: `run` may write
    K and V there, and must leave it zero."""

    def __init__(self, run: DecodePass, capture: Capture, *, null_row: int):
        self._run, self._capture, self._null_row = run, capture, null_row
        self._graphs: dict[tuple[int, int], _Graph] = {}

    def __call__(
        self, tokens: torch.Tensor, position_n: torch.Tensor, lengths_n: torch.Tensor, rows_LnB: torch.Tensor
    ) -> torch.Tensor:
        """See DecodePass. The result is overwritten by the next call."""
        count, blocks = rows_LnB.shape[1:]
        bucket = round_up(count), round_up(blocks)
        graph = self._graphs.get(bucket)
        if graph is None:
            graph = self._graphs[bucket] = self._record(tokens, rows_LnB.shape[0], *bucket)
        for static, given, filler in (
            (graph.tokens, tokens, 0),
            (graph.position_N, position_n, 0),
            (graph.lengths_N, lengths_n, 1),
        ):
            static[:count] = given
            static[count:] = filler
        graph.rows_LNB.fill_(self._null_row)
        graph.rows_LNB[:, :count, :blocks] = rows_LnB
        graph.replay()
        return graph.out[:count]

    def _record(self, like: torch.Tensor, layers: int, count: int, blocks: int) -> _Graph:
        """Recording runs the pass, on rows that belong to nobody."""
        tokens = like.new_zeros(count, *like.shape[1:])
        position_N = torch.zeros(count, dtype=torch.int64, device=like.device)
        lengths_N = torch.ones_like(position_N)
        rows_LNB = torch.full((layers, count, blocks), self._null_row, dtype=torch.int64, device=like.device)
        replay, out = self._capture(lambda: self._run(tokens, position_N, lengths_N, rows_LNB))
        return _Graph(
            tokens=tokens, position_N=position_N, lengths_N=lengths_N, rows_LNB=rows_LNB, replay=replay, out=out
        )


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
