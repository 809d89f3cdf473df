"""Decode by recorded graphs: buckets, padding and null row, with a recording that a CPU can replay too."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from services.llm.kernels.decode_graphs import LEAST_BLOCKS, DecodeGraphs, round_up
from tests import tiny_llm
from tests.fakes.graph_recorder import Recorder

NULL_ROW = 99


def test_round_up() -> None:
    assert [round_up(n) for n in (1, 2, 3, 4, 5, 16, 17)] == [1, 2, 4, 4, 8, 16, 32]


def test_a_graph_sees_the_batch_then_rows_that_are_nobodys() -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]] = []

    def run(tokens_n: torch.Tensor, held_2n: torch.Tensor, rows_LnB: Sequence[torch.Tensor]) -> torch.Tensor:
        seen.append((tokens_n.clone(), held_2n.clone(), tuple(rows.clone() for rows in rows_LnB)))
        return tokens_n * 10

    recorder = Recorder()
    graphs = DecodeGraphs(run, recorder, null_row=NULL_ROW)

    def call(count: int, blocks: int) -> torch.Tensor:
        ids_n = torch.arange(1, count + 1)
        tables = [torch.arange(layers * count * blocks).view(layers, count, blocks) for layers in (2, 3)]
        return graphs(ids_n, torch.stack([ids_n + 4, ids_n + 3]), tables)

    assert call(3, 5).tolist() == [10, 20, 30]
    assert recorder.recorded == 1
    tokens_N, held_2N, tables = seen[0]
    assert tokens_N.tolist() == [0] * 4 and not held_2N.any()
    assert [table.unique().tolist() for table in tables] == [[NULL_ROW]] * 2
    tokens_N, held_2N, tables = seen[-1]
    assert tokens_N.tolist() == [1, 2, 3, 0] and held_2N.tolist() == [[5, 6, 7, 0], [4, 5, 6, 0]]
    for layers, table in zip((2, 3), tables, strict=True):
        assert table.shape == (layers, 4, LEAST_BLOCKS)
        assert torch.equal(table[:, :3, :5], torch.arange(15 * layers).view(layers, 3, 5))
        assert table[:, 3].eq(NULL_ROW).all() and table[:, :, 5:].eq(NULL_ROW).all()

    # A smaller batch of the same bucket leaves nothing of the larger one behind.
    call(4, 8)
    call(3, 6)
    assert recorder.recorded == 1
    tokens_N, held_2N, tables = seen[-1]
    assert tokens_N.tolist() == [1, 2, 3, 0] and held_2N[0].tolist() == [5, 6, 7, 0]
    assert all(table[:, 3].eq(NULL_ROW).all() and table[:, :, 6:].eq(NULL_ROW).all() for table in tables)
    call(5, 6)
    call(3, LEAST_BLOCKS + 1)
    assert recorder.recorded == 3
    graphs.record(20, 700, (2, 3), torch.device("cpu"))
    assert recorder.recorded == 3 + 4 + 5 + 6, "at 256, 1, 2, 16 and 32 are new, at 512 all but 4, at 700 all"
    for count, blocks, width in ((3, 256, 256), (9, 257, 512), (32, 513, 700), (1, 700, 700)):
        assert call(count, blocks).tolist() == [10 * n for n in range(1, count + 1)]
        assert seen[-1][2][0].shape == (2, round_up(count), width)
    replayed = recorder.replayed
    assert call(3, 701).tolist() == [10, 20, 30] and call(33, 5)[32] == 330
    assert (recorder.recorded, recorder.replayed) == (18, replayed), "what no graph fits runs without, and none is made"


def test_nothing_is_recorded_after_the_warm_up() -> None:
    """Its two answers go through a step that decodes one and prefills the other."""
    engine, recorder = tiny_llm.engine(dtype=torch.float32, max_running=4), Recorder()
    engine.runner.use_graphs(recorder)
    lower, mixed = engine.runner.lower, []
    engine.runner.lower = lambda step: mixed.append(bool(step.decode and step.lower)) or lower(step)  # type: ignore
    engine.warm_up()
    engine.runner.lower = lower  # type: ignore[method-assign]
    recorded = recorder.recorded
    assert any(mixed) and not engine.has_work() and recorded >= 3
    stats = engine.stats()
    assert not stats.completion_tokens and not stats.prefill_passes and not stats.kv_pages_used
    requests = [tiny_llm.request(engine, f"r{n}", images=(40 * n,), max_tokens=30) for n in range(1, 9)]
    answers = tiny_llm.run(engine, requests)
    assert all(len(answer[0]) == 30 for answer in answers.values())
    assert recorder.recorded == recorded < recorder.replayed
    engine.check_integrity()


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
    assert 1 <= recorder.recorded < recorder.replayed
    cache = graphed.cache
    assert not cache.key[cache.null_row].any() and not cache.value[cache.null_row].any()
