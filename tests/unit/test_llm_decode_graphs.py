"""Decode by recorded graphs: buckets, padding and null row, with a recording that a CPU can replay too."""

from __future__ import annotations

import pytest
import torch

from services.llm.kernels.decode_graphs import DecodeGraphs, round_up
from tests import tiny_llm
from tests.graph_recorder import Recorder

NULL_ROW = 99


def test_round_up() -> None:
    assert [round_up(n) for n in (1, 2, 3, 4, 5, 16, 17)] == [1, 2, 4, 4, 8, 16, 32]


def test_a_graph_sees_the_batch_then_rows_that_are_nobodys() -> None:
    seen: list[tuple[torch.Tensor, ...]] = []

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(tensor.clone() for tensor in inputs))
        return inputs[0] * 10

    recorder = Recorder()
    graphs = DecodeGraphs(run, recorder, null_row=NULL_ROW)

    def call(count: int, blocks: int) -> torch.Tensor:
        ids_n = torch.arange(1, count + 1)
        return graphs(ids_n, ids_n + 4, ids_n + 5, torch.arange(2 * count * blocks).view(2, count, blocks))

    assert call(3, 5).tolist() == [10, 20, 30]
    assert recorder.recorded == 1
    tokens, position_N, lengths_N, rows_LNB = seen[0]
    assert tokens.tolist() == [0] * 4 and lengths_N.tolist() == [1] * 4 and rows_LNB.unique().tolist() == [NULL_ROW]
    tokens, position_N, lengths_N, rows_LNB = seen[-1]
    assert (tokens.tolist(), position_N.tolist(), lengths_N.tolist()) == ([1, 2, 3, 0], [5, 6, 7, 0], [6, 7, 8, 1])
    assert rows_LNB.shape == (2, 4, 8)
    assert torch.equal(rows_LNB[:, :3, :5], torch.arange(30).view(2, 3, 5))
    assert rows_LNB[:, 3].eq(NULL_ROW).all() and rows_LNB[:, :, 5:].eq(NULL_ROW).all()

    # A smaller batch of the same bucket leaves nothing of the larger one behind.
    call(4, 8)
    call(3, 6)
    assert recorder.recorded == 1
    tokens, _, lengths_N, rows_LNB = seen[-1]
    assert tokens.tolist() == [1, 2, 3, 0] and lengths_N.tolist() == [6, 7, 8, 1]
    assert rows_LNB[:, 3].eq(NULL_ROW).all() and rows_LNB[:, :, 6:].eq(NULL_ROW).all()
    call(5, 6)
    call(3, 9)
    assert recorder.recorded == 3


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_engine_on_graphs_gives_the_same_answers(family: str) -> None:
    plain, graphed = (tiny_llm.engine(family, dtype=torch.float32) for _ in range(2))
    recorder = Recorder()
    graphed.runner.use_graphs(recorder)
    answers = []
    for target in (plain, graphed):
        requests = [
            tiny_llm.request(target, f"r{n}", question=tiny_llm.QUESTIONS[n % 4], images=(40 + n,), image_seed=n,
                             max_tokens=5 + 3 * n)
            for n in range(5)
        ]  # fmt: skip
        answers.append(tiny_llm.run(target, requests))
    assert {name: answer[:2] for name, answer in answers[0].items()} == {
        name: answer[:2] for name, answer in answers[1].items()
    }
    assert 2 <= recorder.recorded < recorder.replayed
    cache = graphed.cache
    assert not cache.key[cache.null_row].any() and not cache.value[cache.null_row].any()
