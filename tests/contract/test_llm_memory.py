"""The KV cache under the engine: what requests hold, when it returns, and what happens when it runs out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from services.llm.engine import Engine
from services.llm.engine_stats import StepFailed
from services.llm.sequence import SequenceState
from tests import tiny_llm


def pool_for(tokens: int) -> int:
    """Bytes of KV cache for so many tokens through all layers."""
    cache = tiny_llm.engine().cache
    return cache.blocks(tokens) * cache.block_bytes


def test_kv_bytes_are_what_the_kept_counts_say_and_pages_of_pruned_tokens_are_free_at_once() -> None:
    engine = tiny_llm.engine()
    pruned = tiny_llm.request(engine, "pruned", images=(300,), threshold=0.2, max_tokens=10)
    engine.submit(pruned)
    sequence = engine._sequences["pruned"]
    engine.step()
    kept = len(sequence.decision.kept)
    assert kept < 150
    length = sequence.prompt_len
    assert sequence.kv_lens == [length, length - 300 + kept]
    assert engine.stats().kv_pages_used == engine.cache.pages_needed(length, length - 300 + kept)
    usage = tiny_llm.run(engine)["pruned"][2].usage
    held = usage.prompt_tokens + 10 - 1  # the last token is never fed back
    token_layer = 2 * 2 * 16 * 4  # K and V, 2 heads of 16, float32
    assert usage.kv_unpruned_bytes == held * 6 * token_layer
    assert usage.kv_bytes == (held * 2 + (held - 300 + kept) * 4) * token_layer
    assert (usage.visual_tokens_uncompressed, usage.visual_tokens_sampled) == (600, 300)
    assert (usage.visual_tokens_kept, usage.prune_layer, usage.num_layers) == (kept, 2, 6)
    assert 0 < usage.time_to_first_token_s < 60
    assert engine.stats().kv_pages_used == 0


def test_pages_are_taken_as_tokens_come_not_for_the_worst_case() -> None:
    engine = tiny_llm.engine()
    engine.submit(tiny_llm.request(engine, images=(), max_tokens=1500))
    sequence = engine._sequences["r"]
    engine.step()
    assert engine.stats().kv_pages_used == engine.cache.pages_needed(sequence.prompt_len, sequence.prompt_len)
    for _ in range(40):
        engine.step()
    assert engine.stats().kv_pages_used == engine.cache.pages_needed(*sequence.kv_lens)
    engine.abort("r")


def test_positions_go_on_from_the_original_prompt_length() -> None:
    engine = tiny_llm.engine()
    engine.submit(tiny_llm.request(engine, threshold=0.2, max_tokens=5))
    sequence = engine._sequences["r"]
    engine.step()
    engine.step()
    assert sequence.kv_lens[0] == sequence.prompt_len + 1
    assert sequence.kv_lens[1] == sequence.prompt_len - sequence.removed + 1 < sequence.kv_lens[0]


def test_the_youngest_gives_way_keeps_its_decision_and_gives_the_same_answer() -> None:
    plain, tight = tiny_llm.engine(prefix_reuse=False), tiny_llm.engine(kv_cache_bytes=pool_for(330))
    requests = [
        tiny_llm.request(plain, f"r{i}", images=(70,), image_seed=i, threshold=0.6, max_tokens=60) for i in range(3)
    ]
    expected = tiny_llm.run(plain, requests)
    found = dict.fromkeys(("r0", "r1", "r2"), 0)
    adopt = tight.cache.adopt

    def spy(request_id: str, keys: Sequence[bytes]) -> int:
        tokens = adopt(request_id, keys)
        found[request_id] += tokens
        return tokens

    tight.cache.adopt = spy  # type: ignore[method-assign]
    for asked in requests:
        tight.submit(asked)
    sequences, events = dict(tight._sequences), []
    decided, preempted = {}, set()
    while tight.has_work():
        events += tight.step()
        tight.check_integrity()
        for name, sequence in sequences.items():
            if sequence.decision is not None:
                assert decided.setdefault(name, sequence.decision) is sequence.decision, "decided once"
            if sequence.state is SequenceState.WAITING and sequence.output_ids:
                preempted.add(name)
                assert sequence.kv_lens == [0, 0]
    assert "r0" not in preempted and preempted, "the oldest never gives way"
    assert tight.stats().preemptions >= len(preempted)
    actual = tiny_llm.collect(events)
    assert {r: a[:2] for r, a in actual.items()} == {r: a[:2] for r, a in expected.items()}
    # The lower layers of what was preempted were still there, but that is no reuse of what another request computed.
    reused = sum(sequence.reused_tokens for sequence in sequences.values())
    assert sum(found.values()) - reused >= 70
    assert tight.stats().prompt_tokens_reused == reused < 3 * 16, "of other images' prompts, the words before the image"
    assert [r for r, event in events if hasattr(event, "reason")][0] == "r0"


@pytest.mark.parametrize("keep_ratio", [None, 0.25])
def test_what_just_fits_alone_runs_and_what_does_not_is_refused(keep_ratio: float | None) -> None:
    engine = tiny_llm.engine(kv_cache_bytes=pool_for(320))
    fits = tiny_llm.request(engine, images=(200,), keep_ratio=keep_ratio, text_sampler=keep_ratio is not None)
    room = 320 - engine.prepare(fits).prompt_len + 1
    for name in ("a", "b"):
        engine.submit(
            tiny_llm.request(
                engine,
                name,
                images=(200,),
                image_seed=3,
                keep_ratio=keep_ratio,
                text_sampler=bool(keep_ratio),
                max_tokens=room,
            )
        )
    assert {len(ids) for ids, _, _ in tiny_llm.run(engine).values()} == {room}
    with pytest.raises(Exception, match="bytes of KV cache, this server has"):
        engine.submit(tiny_llm.request(engine, images=(200,), text_sampler=False, max_tokens=room + 1))


def test_abort_in_every_state_frees_everything_at_once() -> None:
    engine = tiny_llm.engine(max_running=2, prefix_reuse=False)
    for index in range(4):
        engine.submit(tiny_llm.request(engine, f"r{index}", image_seed=index, keep_ratio=0.5, max_tokens=6))
    engine.step()  # r0 and r1 prefilled, r2 and r3 wait
    engine.step()
    used = engine.stats().kv_pages_used
    assert engine.abort("r3").reason == "abort"
    assert engine.stats().kv_pages_used == used, "a waiting request held nothing"
    end = engine.abort("r0")
    assert (end.reason, end.usage.completion_tokens) == ("abort", 2)
    engine.check_integrity()
    assert engine.stats().kv_pages_used == used // 2
    assert engine.abort("r0") is None, "finished already"
    assert engine.abort("never seen") is None
    finished = tiny_llm.run(engine)
    assert finished.keys() == {"r1", "r2"}
    assert engine.stats().kv_pages_used == 0


def test_totals_are_of_requests_that_were_prefilled() -> None:
    engine = tiny_llm.engine(max_batch_tokens=60, max_running=1)
    for name, seed in (("done", 0), ("aborted", 0), ("split", 1), ("waits", 2)):
        engine.submit(tiny_llm.request(engine, name, images=(90,), image_seed=seed, keep_ratio=0.5, max_tokens=3))
    while not engine.stats().completion_tokens:
        engine.step()
    done = engine.stats()
    assert (done.completion_tokens, done.visual_tokens_sampled, done.visual_tokens_kept) == (3, 90, 45)

    while not engine._sequences["aborted"].output_ids:
        engine.step()
    length = engine._sequences["aborted"].prompt_len
    engine.abort("aborted")  # after its first token
    counted = {"prompt_tokens": 2 * length, "completion_tokens": 4, "visual_tokens_sampled": 180,
               "visual_tokens_kept": 90, "prompt_tokens_reused": length - length % 16}  # fmt: skip
    assert vars(engine.stats()).items() >= counted.items()

    engine.step()
    assert engine._sequences["split"].kv_lens[0]
    for name in ("split", "waits"):
        engine.abort(name)
    assert vars(engine.stats()).items() >= counted.items(), "no prefill of them ended"


def test_abort_in_the_middle_of_a_split_prompt() -> None:
    engine = tiny_llm.engine(max_batch_tokens=20)
    for stop in range(1, 12):
        engine.submit(tiny_llm.request(engine, images=(90,), image_seed=stop, threshold=0.7))
        for _ in range(stop):
            engine.step()
        assert engine.abort("r").reason == "abort"
        engine.check_integrity()
        assert engine.stats().kv_pages_used == 0


@pytest.mark.parametrize("prefix_reuse", [True, False])
def test_a_storm_of_1000_aborts_leaves_the_pool_as_it_was(prefix_reuse: bool) -> None:
    engine = tiny_llm.engine(
        max_running=16, max_batch_tokens=120, kv_cache_bytes=pool_for(600), prefix_reuse=prefix_reuse
    )
    generator = torch.Generator().manual_seed(0)
    alive: list[str] = []
    for index in range(1000):
        name = f"r{index}"
        engine.submit(
            tiny_llm.request(
                engine,
                name,
                images=((20,), (), (45,), (100,))[index % 4],
                max_tokens=1 + index % 40,
                image_seed=index % 12,
                **({"keep_ratio": 0.3} if index % 3 else {"text_sampler": False}),
            )
        )
        alive.append(name)
        if index % 3 == 0:
            done = {request_id for request_id, event in engine.step() if hasattr(event, "reason")}
            alive = [each for each in alive if each not in done]
        while alive and torch.rand((), generator=generator) < 0.5:
            victim = alive.pop(int(torch.randint(len(alive), (), generator=generator)))
            assert engine.abort(victim).reason == "abort"
            engine.check_integrity()
    for name in alive:
        engine.abort(name)
    engine.check_integrity()
    stats = engine.stats()
    assert stats.kv_pages_used == stats.running == stats.waiting == 0
    assert engine.cache.pool.free_pages + stats.kv_pages_cached == stats.kv_pages_total
    assert bool(stats.kv_pages_cached) == prefix_reuse
    # All of it can be had again.
    assert_runs_alone_with_the_whole_pool(engine, 600)


def test_a_sequence_that_cannot_take_its_token_ends_alone() -> None:
    engine = tiny_llm.engine()
    asked_for = {"done": 1, "bad": 5, "other": 5}
    requests = [tiny_llm.request(engine, name, image_seed=ord(name[0]), max_tokens=n) for name, n in asked_for.items()]
    expected = tiny_llm.run(tiny_llm.engine(), requests)
    for asked in requests:
        engine.submit(asked)

    def fail(token: int) -> str:
        raise RuntimeError("broken card")

    engine._sequences["bad"].detokenizer.push = fail  # type: ignore[method-assign]
    with pytest.raises(StepFailed) as failure:
        engine.step()
    assert failure.value.request_ids == ("bad",) and "broken card" in str(failure.value.__cause__)
    assert [request_id for request_id, _ in failure.value.events] == ["done", "done", "other"]
    assert engine.stats().failed_steps == 0, "the others got on"
    events = list(failure.value.events)
    while engine.has_work():
        events += engine.step()
        engine.check_integrity()
    answers = tiny_llm.collect(events)
    assert {name: answer[:2] for name, answer in answers.items()} == {
        name: expected[name][:2] for name in ("done", "other")
    }


def test_failed_steps_are_counted_until_a_request_ends_well() -> None:
    engine = tiny_llm.engine(max_running=1)
    for name in ("a", "b", "c"):
        engine.submit(tiny_llm.request(engine, name, max_tokens=2))
    for count in (1, 2):
        with tiny_llm.broken_layer(3, "x"), pytest.raises(StepFailed):
            engine.step()
        assert engine.stats().failed_steps == count
    engine.step()
    assert engine.stats().failed_steps == 2, "a first token is no answer yet"
    engine.step()
    assert engine.stats().failed_steps == 0


def assert_runs_alone_with_the_whole_pool(engine: Engine, tokens: int) -> None:
    asked = tiny_llm.request(engine, "whole", images=(tokens - 100,), image_seed=99, text_sampler=False, max_tokens=40)
    assert len(tiny_llm.run(engine, [asked])["whole"][0]) == 40


def test_a_freed_block_leaks_nothing_into_the_next_request() -> None:
    engine = tiny_llm.engine(prefix_reuse=False, max_batch_tokens=40)
    expected = tiny_llm.run(engine, [tiny_llm.request(engine, max_tokens=40)])["r"][0]
    engine.cache.key[: engine.cache.null_row].fill_(float("nan"))  # what a broken request may have left
    engine.cache.value[: engine.cache.null_row].fill_(float("nan"))
    engine.cache.hidden.fill_(float("nan"))
    assert tiny_llm.run(engine, [tiny_llm.request(engine, max_tokens=40)])["r"][0] == expected


@pytest.mark.parametrize("layer", [0, 4])
def test_a_failed_step_ends_its_requests_only_and_nobody_finds_what_it_computed(layer: int) -> None:
    engine = tiny_llm.engine(max_running=2)
    for name in ("a", "b", "c"):
        engine.submit(tiny_llm.request(engine, name))
    expected = tiny_llm.run(tiny_llm.engine(), [tiny_llm.request(engine, "c")])["c"][0]
    with tiny_llm.broken_layer(layer, "broken card"), pytest.raises(StepFailed) as failure:
        engine.step()
    assert failure.value.request_ids == ("a", "b")
    assert "broken card" not in str(failure.value) and "broken card" in str(failure.value.__cause__)
    engine.check_integrity()
    assert engine.stats().kv_pages_cached == 0
    assert tiny_llm.run(engine)["c"][0] == expected
