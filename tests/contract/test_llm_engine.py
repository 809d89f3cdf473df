"""The LLM stage against transformers' own models and against a reference that keeps no cache."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from services.common.errors import InvalidInput, TooLarge, WrongFingerprint
from services.common.types import GenerateRequest
from services.llm.attention import PrefillStep
from services.llm.engine import Engine, StepFailed
from services.llm.sequence import Sequence
from tests import tiny_llm
from tests.tiny_checkpoints import FAMILIES

PRUNE_LAYER = 2


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def causal_mask(size: int) -> torch.Tensor:
    return torch.full((size, size), torch.finfo(torch.float32).min).triu(1)[None, None]


def admit(engine: Engine, asked: GenerateRequest) -> Sequence:
    engine.submit(asked)
    return engine.scheduler._admit()[0]


def reference_forward(lm: Any, hidden_SD: torch.Tensor, prune: dict[str, Any] | None) -> tuple[torch.Tensor, list[int]]:
    """Logits [S', V] of a whole sequence, recomputed from its embeddings with explicit masks; and the kept indices.

    prune: instruction, visual (positions) and threshold, applied before layer PRUNE_LAYER; None prunes nothing.
    """
    position_S = torch.arange(len(hidden_SD))
    hidden_1SD, kept = hidden_SD[None], []
    for index, layer in enumerate(lm.model.layers):
        rotary = lm.model.rotary_emb(hidden_1SD, position_S[None])
        if prune and index == PRUNE_LAYER:
            kept = naive_kept(layer, hidden_1SD[0], rotary, **prune)
            dropped = {p for i, p in enumerate(prune["visual"]) if i not in kept}
            position_S = torch.tensor([p for p in position_S.tolist() if p not in dropped])
            hidden_1SD = hidden_1SD[:, position_S]
            rotary = lm.model.rotary_emb(hidden_1SD, position_S[None])
        hidden_1SD = layer(
            hidden_1SD,
            attention_mask=causal_mask(len(position_S)),
            position_ids=position_S[None],
            position_embeddings=rotary,
        )
    return lm.lm_head(lm.model.norm(hidden_1SD))[0], kept


def naive_kept(
    layer: Any, hidden_SD: torch.Tensor, rotary: Any, instruction: list[int], visual: list[int], threshold: float
) -> list[int]:
    """Eq. 6-9 in loops."""
    attention, normed_SD = layer.self_attn, layer.input_layernorm(hidden_SD)
    query_1HSd = attention.q_proj(normed_SD).view(1, len(hidden_SD), -1, attention.head_dim).transpose(1, 2)
    key_1GSd = attention.k_proj(normed_SD).view(1, len(hidden_SD), -1, attention.head_dim).transpose(1, 2)
    query_1HSd, key_1GSd = apply_rotary_pos_emb(query_1HSd, key_1GSd, *rotary)
    share = [0.0] * len(visual)
    for token in instruction:
        best = torch.zeros(len(visual))
        for head in range(query_1HSd.shape[1]):
            key_Sd = key_1GSd[0, head // attention.num_key_value_groups]
            scores = torch.stack([query_1HSd[0, head, token] @ key_Sd[v] for v in visual]) * attention.head_dim**-0.5
            best = torch.maximum(best, scores.softmax(0))
        share = [s + b / len(instruction) for s, b in zip(share, best.tolist(), strict=True)]
    kept: list[int] = []
    for index in sorted(range(len(visual)), key=lambda i: -share[i]):
        if sum(share[i] for i in kept) >= threshold * sum(share):
            break
        kept.append(index)
    return sorted(kept)


def reference_generate(
    lm: Any, engine: Engine, asked: GenerateRequest, steps: int, threshold: float | None
) -> tuple[list[int], list[int]]:
    """Greedy tokens with everything recomputed for each one; and the kept visual tokens."""
    embeddings_SD = tiny_llm.reference_embeddings(lm, engine, asked)
    prompt = engine.prepare(asked).prompt
    prune = None
    if threshold is not None:
        visual = [p for first, last in prompt.visual_spans for p in range(first, last)]
        prune = {"instruction": list(prompt.instruction_positions), "visual": visual, "threshold": threshold}
    tokens: list[int] = []
    kept: list[int] = []
    with torch.no_grad():
        for _ in range(steps):
            logits, kept = reference_forward(lm, embeddings_SD, prune)
            tokens.append(int(logits[-1].argmax()))
            embeddings_SD = torch.cat([embeddings_SD, lm.model.embed_tokens.weight[tokens[-1]][None]])
    return tokens, kept


@pytest.mark.parametrize("family", FAMILIES)
def test_unpruned_logits_equal_transformers_at_every_prompt_and_decode_position(family: str) -> None:
    engine = tiny_llm.engine(family)
    lm = tiny_llm.reference_lm(tiny_llm.checkpoint(family))
    asked = tiny_llm.request(engine, images=(37, 21), prune=False, max_tokens=24)
    prompt_SD = tiny_llm.reference_embeddings(lm, engine, asked)
    forced = torch.randint(5, 300, (20,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole_SD = torch.cat([prompt_SD, lm.model.embed_tokens(forced)])
        expected = lm(inputs_embeds=whole_SD[None], use_cache=False).logits[0]

    sequence = admit(engine, asked)
    length = len(prompt_SD)
    with torch.inference_mode():
        # All prompt positions: the pass as the runner makes it, logits of every token.
        decoder, hidden = engine.decoder, prompt_SD
        rotary = decoder.rotary(torch.arange(length))
        for group, (first, last) in enumerate(((0, PRUNE_LAYER), (PRUNE_LAYER, tiny_llm.LAYERS))):
            hidden = decoder.run_layers(hidden, rotary, first, last, PrefillStep(engine.cache, group, ["r"], [length]))
        close(decoder.logits(hidden), expected[:length])
        # The runner's own prefill, then decode through the cache with forced tokens.
        close(engine.runner.prefill([sequence])[0], expected[length - 1])
        for index, token in enumerate(forced.tolist()):
            sequence.output_ids.append(token)
            close(engine.runner.decode([sequence])[0], expected[length + index])


@pytest.mark.parametrize("family", FAMILIES)
def test_unpruned_greedy_tokens_equal_transformers_generate(family: str) -> None:
    engine = tiny_llm.engine(family)
    lm = tiny_llm.reference_lm(tiny_llm.checkpoint(family))
    asked = tiny_llm.request(engine, max_tokens=32, prune=False)
    embeddings_SD = tiny_llm.reference_embeddings(lm, engine, asked)
    expected = lm.generate(
        inputs_embeds=embeddings_SD[None], max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    ids, _, end = tiny_llm.run(engine, [asked])["r"]
    assert ids == expected[0].tolist()
    assert (end.reason, end.usage.completion_tokens, end.usage.prompt_tokens) == ("length", 32, len(embeddings_SD))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("images", "threshold"), [((40,), 0.6), ((33, 18), 0.85), ((17,), 0.05)])
def test_pruned_generation_with_cache_equals_recomputation_without(
    family: str, images: tuple[int, ...], threshold: float
) -> None:
    engine = tiny_llm.engine(family)
    lm = tiny_llm.reference_lm(tiny_llm.checkpoint(family))
    asked = tiny_llm.request(engine, images=images, threshold=threshold, max_tokens=20)
    expected, kept = reference_generate(lm, engine, asked, 20, threshold)
    assert 0 < len(kept) < sum(images)
    engine.submit(asked)
    sequence = engine._sequences["r"]
    ids, _, end = tiny_llm.run(engine)["r"]
    assert sequence.decision.kept.tolist() == kept
    assert (sequence.decision.layer, sequence.decision.threshold) == (PRUNE_LAYER, threshold)
    assert ids == expected
    assert end.usage.visual_tokens_kept == len(kept)


def test_pruned_logits_equal_recomputation() -> None:
    engine = tiny_llm.engine("qwen2")
    lm = tiny_llm.reference_lm(tiny_llm.checkpoint("qwen2"))
    asked = tiny_llm.request(engine, images=(50,), threshold=0.7, max_tokens=12)
    embeddings_SD = tiny_llm.reference_embeddings(lm, engine, asked)
    sequence = admit(engine, asked)
    prompt = sequence.prompt
    prune = {
        "instruction": list(prompt.instruction_positions),
        "visual": prompt.visual_positions().tolist(),
        "threshold": 0.7,
    }
    with torch.inference_mode():
        actual = engine.runner.prefill([sequence])[0]
        for token in (7, 300, 41, 99):
            expected, _ = reference_forward(lm, embeddings_SD, prune)
            close(actual, expected[-1])
            sequence.output_ids.append(token)
            actual = engine.runner.decode([sequence])[0]
            embeddings_SD = torch.cat([embeddings_SD, lm.model.embed_tokens.weight[token][None]])


def test_a_long_questions_importance_is_the_mean_over_all_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for size in (10_000, 3):
        monkeypatch.setattr("services.llm.model.SCORED_QUERIES", size)
        engine = tiny_llm.engine()
        engine.submit(tiny_llm.request(engine, threshold=0.7))
        sequence = engine._sequences["r"]
        engine.step()
        results.append(sequence.decision)
    torch.testing.assert_close(results[0].importance, results[1].importance)
    assert results[0].importance.sum() > 0
    assert results[0].kept.tolist() == results[1].kept.tolist()


def mixed_requests(engine: Engine, count: int) -> list[GenerateRequest]:
    """Pruned and not, at several thresholds, with no, one and two images, greedy and sampled, of many lengths."""
    images = ((40,), (), (25, 31), (64,), (9,))
    prunes = ({}, {"prune": False}, {"threshold": 0.3}, {"threshold": 0.95}, {"threshold": 1.0}, {"threshold": 0.6})
    draws = ({}, {"temperature": 1.0, "seed": 7}, {"temperature": 0.7, "top_p": 0.8, "seed": 3})
    return [
        tiny_llm.request(
            engine,
            f"r{i}",
            question=tiny_llm.QUESTIONS[i % 4],
            images=images[i % 5],
            image_seed=i,
            max_tokens=3 + (7 * i) % 19,
            **prunes[i % 6],
            **draws[i % 3],
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_equals_alone(family: str) -> None:
    engine = tiny_llm.engine(family, max_batch_tokens=200, max_running=9)
    requests = mixed_requests(engine, 30)
    alone = {}
    for asked in requests:
        alone |= tiny_llm.run(engine, [asked])
    # Submitted at different times: some together, some while others prefill or decode.
    events, waiting, most_running = [], list(requests), 0
    for step in range(10_000):
        if not waiting and not engine.has_work():
            break
        for _ in range(min(len(waiting), (3, 0, 1, 0, 0, 4)[step % 6])):
            engine.submit(waiting.pop(0))
        events += engine.step()
        engine.check_integrity()
        most_running = max(most_running, engine.stats().running)
    together = tiny_llm.collect(events)
    assert most_running == 9
    assert together.keys() == alone.keys()
    for request_id, (ids, text, end) in alone.items():
        assert together[request_id][0] == ids, request_id
        assert together[request_id][1] == text
        assert together[request_id][2].reason == end.reason
        assert together[request_id][2].usage.kv_bytes == end.usage.kv_bytes
        assert together[request_id][2].usage.visual_tokens_kept == end.usage.visual_tokens_kept
    assert len({tuple(ids) for ids, _, _ in alone.values()}) > 20, "the requests must differ for this to mean anything"


def test_a_tight_pool_delays_requests_and_changes_no_answer() -> None:
    roomy = tiny_llm.engine(max_running=32)
    requests = mixed_requests(roomy, 20)
    expected = tiny_llm.run(roomy, requests)
    largest = max(roomy.cache.pages_needed(roomy.prepare(asked).max_kv_len) for asked in requests)
    tight = tiny_llm.engine(max_running=32, kv_cache_bytes=(largest + 3) * roomy.cache.page_bytes)
    actual = tiny_llm.run(tight, requests)
    assert {r: ids for r, (ids, _, _) in actual.items()} == {r: ids for r, (ids, _, _) in expected.items()}
    assert tight.stats().prefill_passes > roomy.stats().prefill_passes


@pytest.mark.parametrize("family", FAMILIES)
def test_threshold_one_equals_off(family: str) -> None:
    engine = tiny_llm.engine(family)
    full = tiny_llm.run(engine, [tiny_llm.request(engine, threshold=1.0, max_tokens=24)])["r"]
    off = tiny_llm.run(engine, [tiny_llm.request(engine, prune=False, max_tokens=24)])["r"]
    assert full[0] == off[0]
    for _, _, end in (full, off):
        assert end.usage.visual_tokens_kept == end.usage.visual_tokens_sampled == 40
        assert end.usage.kv_bytes == end.usage.kv_bytes_unpruned
        assert end.usage.prune_layer == 0


def test_kv_bytes_are_what_the_kept_counts_say_and_pages_return_at_once() -> None:
    engine = tiny_llm.engine()
    pruned = tiny_llm.request(engine, "pruned", images=(300,), threshold=0.2, max_tokens=10)
    engine.submit(pruned)
    sequence = engine._sequences["pruned"]
    engine.step()
    kept = len(sequence.decision.kept)
    assert kept < 150
    # The pool holds what the shrunken group needs, not what was reserved.
    longest = sequence.max_kv_len
    assert engine.stats().kv_blocks_used == engine.cache.pages_needed(longest, 0) + engine.cache.pages_needed(
        longest - 300 + kept, 1
    )
    usage = tiny_llm.run(engine)["pruned"][2].usage
    held = usage.prompt_tokens + 10 - 1  # the last token is never fed back
    token_layer = 2 * 2 * 16 * 4  # K and V, 2 heads of 16, float32
    assert usage.kv_bytes_unpruned == held * 6 * token_layer
    assert usage.kv_bytes == (held * 2 + (held - 300 + kept) * 4) * token_layer
    assert (usage.visual_tokens_uncompressed, usage.visual_tokens_sampled) == (600, 300)
    assert (usage.visual_tokens_kept, usage.prune_layer, usage.num_layers) == (kept, 2, 6)
    assert 0 < usage.time_to_first_token_s < 60
    assert engine.stats().kv_blocks_used == 0


def test_positions_go_on_from_the_original_prompt_length() -> None:
    engine = tiny_llm.engine()
    engine.submit(tiny_llm.request(engine, threshold=0.2, max_tokens=5))
    sequence = engine._sequences["r"]
    engine.step()
    engine.step()
    assert sequence.next_position == sequence.prompt_len + 1 == sequence.kv_lens[0]
    assert sequence.kv_lens[1] == sequence.kept_prompt_len + 1 < sequence.kv_lens[0]


def test_seed_decides_whatever_the_batch_and_no_seed_varies() -> None:
    engine = tiny_llm.engine()
    one = tiny_llm.request(engine, "a", temperature=1.0, max_tokens=16)
    seeded = [GenerateRequest(**{**vars(one), "request_id": f"s{i}", "sampling": _seed(one, 5)}) for i in range(3)]
    free = [GenerateRequest(**{**vars(one), "request_id": f"f{i}"}) for i in range(3)]
    other = [GenerateRequest(**{**vars(one), "request_id": "o", "sampling": _seed(one, 6)})]
    results = tiny_llm.run(engine, [*seeded, *free, *other])
    by_itself = tiny_llm.run(engine, seeded[:1])["s0"][0]
    assert by_itself == results["s0"][0] == results["s1"][0] == results["s2"][0]
    assert results["o"][0] != by_itself
    assert len({tuple(results[f"f{i}"][0]) for i in range(3)}) == 3


def _seed(asked: GenerateRequest, seed: int) -> Any:
    return type(asked.sampling)(**{**vars(asked.sampling), "seed": seed})


def test_abort_in_every_state_frees_everything_at_once() -> None:
    engine = tiny_llm.engine(max_running=2)
    for index in range(4):
        engine.submit(tiny_llm.request(engine, f"r{index}", max_tokens=6))
    engine.step()  # r0 and r1 prefilled, r2 and r3 wait
    engine.step()
    used = engine.stats().kv_blocks_used
    assert engine.abort("r3").reason == "abort"
    assert engine.stats().kv_blocks_used == used, "a waiting request held nothing"
    end = engine.abort("r0")
    assert (end.reason, end.usage.completion_tokens) == ("abort", 2)
    engine.check_integrity()
    assert engine.stats().kv_blocks_used == used // 2
    assert engine.abort("r0") is None, "finished already"
    assert engine.abort("never seen") is None
    finished = tiny_llm.run(engine)
    assert finished.keys() == {"r1", "r2"}
    assert engine.stats().kv_blocks_used == 0


def test_abort_storm() -> None:
    engine = tiny_llm.engine(max_running=8, kv_cache_bytes=2 * 2**20)
    generator = torch.Generator().manual_seed(0)
    alive: list[str] = []
    for index in range(200):
        name = f"r{index}"
        asked = tiny_llm.request(
            engine, name, images=((20,), (), (45,))[index % 3], max_tokens=1 + index % 12, image_seed=index
        )
        engine.submit(asked)
        alive.append(name)
        if index % 3 == 0:
            done = {request_id for request_id, event in engine.step() if hasattr(event, "reason")}
            alive = [each for each in alive if each not in done]
        while alive and torch.rand((), generator=generator) < 0.6:
            victim = alive.pop(int(torch.randint(len(alive), (), generator=generator)))
            assert engine.abort(victim).reason == "abort"
            engine.check_integrity()
    tiny_llm.run(engine)
    assert engine.stats().kv_blocks_used == engine.stats().running == engine.stats().waiting == 0
    engine.check_integrity()


def test_a_freed_block_leaks_nothing_into_the_next_request() -> None:
    engine = tiny_llm.engine()
    expected = tiny_llm.run(engine, [tiny_llm.request(engine, max_tokens=12)])["r"][0]
    engine.cache.key[:-1].fill_(float("nan"))  # all but the null page: what a broken request may have left
    engine.cache.value[:-1].fill_(float("nan"))
    assert tiny_llm.run(engine, [tiny_llm.request(engine, max_tokens=12)])["r"][0] == expected


def test_a_failed_pass_ends_its_requests_only() -> None:
    engine = tiny_llm.engine(max_running=2)
    for name in ("a", "b", "c"):
        engine.submit(tiny_llm.request(engine, name))
    expected = tiny_llm.run(tiny_llm.engine(), [tiny_llm.request(engine, "c")])["c"][0]
    hook = engine.decoder.layers[4].register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken card")))
    with pytest.raises(StepFailed) as failure:
        engine.step()
    hook.remove()
    assert failure.value.request_ids == ("a", "b")
    assert "broken card" not in str(failure.value) and "broken card" in str(failure.value.__cause__)
    engine.check_integrity()
    assert tiny_llm.run(engine)["c"][0] == expected


def test_stop_reasons_and_the_clip_to_the_context() -> None:
    engine = tiny_llm.engine()
    free = tiny_llm.run(engine, [tiny_llm.request(engine, max_tokens=12)])["r"]
    # Make the fifth greedy token the end of sequence.
    engine.eos_token_ids = frozenset({free[0][4]})
    first = free[0].index(free[0][4])
    ids, _, end = tiny_llm.run(engine, [tiny_llm.request(engine, max_tokens=12, ignore_eos=False)])["r"]
    assert (ids, end.reason) == (free[0][: first + 1], "stop")
    ids, _, end = tiny_llm.run(engine, [tiny_llm.request(engine, max_tokens=12)])["r"]
    assert (ids, end.reason) == (free[0], "length")

    narrow = tiny_llm.engine(folder=tiny_llm.checkpoint("llama", context=96))
    ids, _, end = tiny_llm.run(narrow, [tiny_llm.request(narrow, images=(50,), max_tokens=10_000)])["r"]
    assert end.reason == "length"
    assert end.usage.prompt_tokens + len(ids) == 96
    with pytest.raises(InvalidInput, match=r"prompt of \d+ tokens \(90 of them visual\).*context of 96"):
        narrow.submit(tiny_llm.request(narrow, images=(90,)))
    with pytest.raises(InvalidInput, match="context of 96"):
        narrow.submit(tiny_llm.request(narrow, images=(), question="number " * 200))


def test_stop_string_ends_the_answer_before_it() -> None:
    engine = tiny_llm.engine()
    ids, text, _ = tiny_llm.run(engine, [tiny_llm.request(engine, max_tokens=40)])["r"]
    pieces = [engine.renderer.tokenizer.decode([token]) for token in ids]
    # A stop string over a token boundary: the end of one printable token with the beginning of the next.
    at = next(i for i in range(8, 38) if all(p.isascii() and len(p) > 1 for p in pieces[i : i + 2]))
    stop = pieces[at][-1] + pieces[at + 1][0]
    cut = text.index(stop)
    stopped_ids, stopped, end = tiny_llm.run(engine, [tiny_llm.request(engine, max_tokens=40, stop=("never", stop))])[
        "r"
    ]
    assert stopped == text[:cut]
    assert end.reason == "stop"
    assert len(stopped_ids) == end.usage.completion_tokens <= at + 2


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_fingerprint": "f" * 64}, WrongFingerprint, r"images\[1\].model_fingerprint"),
        ({"tokens_ND": torch.randn(5, 63)}, InvalidInput, r"images\[1\].tokens: .*\[5, 63\].*64"),
        ({"tokens_ND": torch.randn(0, 64)}, InvalidInput, r"\[0, 64\]"),
        ({"tokens_ND": torch.randn(64)}, InvalidInput, r"\[64\]"),
        ({"tokens_ND": torch.ones(3, 64, dtype=torch.int64)}, InvalidInput, "int64"),
        ({"tokens_ND": torch.full((3, 64), float("nan"))}, InvalidInput, "finite"),
        ({"tokens_ND": torch.full((3, 64), float("inf"), dtype=torch.bfloat16)}, InvalidInput, "finite"),
    ],
)
def test_visual_tokens_that_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    engine = tiny_llm.engine()
    asked = tiny_llm.request(engine, images=(5, 5))
    bad = tiny_llm.image(engine.fingerprint, 5, **changes)
    with pytest.raises(error, match=message):
        engine.submit(GenerateRequest(**{**vars(asked), "images": (asked.images[0], bad)}))
    assert not engine.has_work()


def test_a_value_that_overflows_the_models_dtype_is_refused() -> None:
    engine = tiny_llm.engine(dtype=torch.float16)
    asked = tiny_llm.request(engine, images=(5,))
    bad = tiny_llm.image(engine.fingerprint, 5, tokens_ND=torch.full((5, 64), 1e6))
    with pytest.raises(InvalidInput, match="float16"):
        engine.submit(GenerateRequest(**{**vars(asked), "images": (bad,)}))


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.01, float("nan"), float("inf")])
def test_thresholds_that_are_refused(threshold: float) -> None:
    engine = tiny_llm.engine()
    with pytest.raises(InvalidInput, match=r"prune.threshold: is .*expected \(0, 1\]"):
        engine.submit(tiny_llm.request(engine, threshold=threshold))


def test_too_large_is_refused_with_the_numbers_and_duplicate_ids_too() -> None:
    engine = tiny_llm.engine(kv_cache_bytes=100_000)
    with pytest.raises(
        TooLarge, match=r"prompt of \d+ tokens and up to 500 new ones need \d+ bytes .* has \d+"
    ) as error:
        engine.submit(tiny_llm.request(engine, max_tokens=500))
    needed, has = (
        int(word) for word in str(error.value).replace("(", "").split() if word.isdigit() and int(word) > 9e4
    )
    assert needed > has and has <= 100_000
    assert not engine.has_work()
    engine.submit(tiny_llm.request(engine, images=(5,), max_tokens=2))
    with pytest.raises(InvalidInput, match="request_id: 'r' is in flight"):
        engine.submit(tiny_llm.request(engine, images=(5,), max_tokens=2))
    assert tiny_llm.run(engine)["r"][2].usage.completion_tokens == 2


def test_no_image_means_no_pruning() -> None:
    engine = tiny_llm.engine()
    usage = tiny_llm.run(engine, [tiny_llm.request(engine, images=(), threshold=0.1)])["r"][2].usage
    assert (usage.visual_tokens_sampled, usage.visual_tokens_kept, usage.prune_layer) == (0, 0, 0)
    assert usage.kv_bytes == usage.kv_bytes_unpruned
    assert usage.converted_share == 1.0


def test_loads_without_the_encoders_shards_and_with_tied_embeddings(tmp_path: Any) -> None:
    folder = tmp_path / "tied"
    shutil.copytree(tiny_llm.checkpoint("qwen2", tied=True), folder)
    for shard in folder.glob("encoder-*.safetensors"):
        shard.unlink()
    engine = tiny_llm.engine(folder=folder)
    head, table = engine.decoder.lm.lm_head.weight, engine.decoder.lm.model.embed_tokens.weight
    assert head.data_ptr() == table.data_ptr()
    lm = tiny_llm.reference_lm(folder)
    asked = tiny_llm.request(engine, prune=False, max_tokens=8)
    expected, _ = reference_generate(lm, engine, asked, 8, None)
    assert tiny_llm.run(engine, [asked])["r"][0] == expected


def test_bfloat16_runs_and_halves_the_cache() -> None:
    wide, narrow = tiny_llm.engine(), tiny_llm.engine(dtype=torch.bfloat16)
    results = [tiny_llm.run(e, [tiny_llm.request(e, max_tokens=6, prune=False)])["r"] for e in (wide, narrow)]
    assert results[1][2].usage.kv_bytes * 2 == results[0][2].usage.kv_bytes
    assert len(results[1][0]) == 6
    assert narrow.cache.key.dtype == torch.bfloat16
    pruned = tiny_llm.run(narrow, [tiny_llm.request(narrow, threshold=0.5)])["r"][2].usage
    assert 0 < pruned.visual_tokens_kept < 40


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_sliding_windows_and_batch_dependent_rope_are_refused(family: str) -> None:
    from services.checkpoint.config import FocusLlavaConfig
    from services.llm.model import check_decoder

    config = FocusLlavaConfig.load(tiny_llm.checkpoint(family)).text_config
    check_decoder(config)
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(InvalidInput, match="'dynamic'"):
        check_decoder(config)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    config.sliding_window = 512
    if family == "qwen2":
        config.use_sliding_window = True
    with pytest.raises(InvalidInput, match="text.sliding_window: is 512, .* 2048"):
        check_decoder(config)
