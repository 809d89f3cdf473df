"""The LLM stage against transformers' own models and against a reference that keeps no cache."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from services.common.errors import InvalidInput
from tests import tiny_llm
from tests.llm_reference import PRUNE_LAYER, close, forced_tokens, reference_forward, reference_generate
from tests.tiny_checkpoints import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [512, 20])
def test_unpruned_logits_equal_transformers_at_every_prompt_and_decode_position(
    family: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_llm.engine(family, max_batch_tokens=budget)
    lm = tiny_llm.reference_lm(tiny_llm.checkpoint(family))
    asked = tiny_llm.request(engine, images=(37, 21), text_sampler=False, max_tokens=21)
    prompt_SD = tiny_llm.reference_embeddings(lm, engine, asked)
    forced = torch.randint(5, 300, (21,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole_SD = torch.cat([prompt_SD, lm.model.embed_tokens(forced)])
        expected = lm(inputs_embeds=whole_SD[None], use_cache=False).logits[0]

    decoder, run_layers, hidden = engine.decoder, engine.decoder.run_layers, []

    def spy(hidden_SD: torch.Tensor, rotary: Any, first: int, last: int, step: Any) -> torch.Tensor:
        wanted, step.final_rows = step.final_rows, None  # every position's, not only those that are sampled from
        result = run_layers(hidden_SD, rotary, first, last, step)
        if last == tiny_llm.LAYERS:
            hidden.append(result)
        return result if wanted is None else result[wanted]

    monkeypatch.setattr(decoder, "run_layers", spy)
    with forced_tokens(forced.tolist()) as logits:
        tiny_llm.run(engine, [asked])
    with torch.inference_mode():
        close(decoder.logits(torch.cat(hidden)), expected[:-1])  # every position, in one chunk or many
    close(torch.stack(logits), expected[len(prompt_SD) - 1 : -1])
    assert engine.stats().prefill_passes == 1 or budget == 20


@pytest.mark.parametrize("family", FAMILIES)
def test_unpruned_greedy_tokens_equal_transformers_generate(family: str) -> None:
    engine = tiny_llm.engine(family)
    lm = tiny_llm.reference_lm(tiny_llm.checkpoint(family))
    asked = tiny_llm.request(engine, max_tokens=32, text_sampler=False)
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


@pytest.mark.parametrize("budget", [512, 20])
def test_pruned_logits_equal_recomputation(budget: int) -> None:
    engine = tiny_llm.engine("qwen2", max_batch_tokens=budget)
    lm = tiny_llm.reference_lm(tiny_llm.checkpoint("qwen2"))
    forced = (7, 300, 41, 99)
    asked = tiny_llm.request(engine, images=(50,), threshold=0.7, max_tokens=len(forced))
    embeddings_SD = tiny_llm.reference_embeddings(lm, engine, asked)
    prompt = engine.prepare(asked).prompt
    prune = {
        "instruction": list(prompt.instruction_positions),
        "visual": prompt.visual_positions().tolist(),
        "threshold": 0.7,
    }
    with forced_tokens(forced) as logits:
        tiny_llm.run(engine, [asked])
    with torch.no_grad():
        for actual, token in zip(logits, forced, strict=True):
            expected, _ = reference_forward(lm, embeddings_SD, prune)
            close(actual, expected[-1])
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


def test_loads_without_the_encoders_shards_and_with_tied_embeddings(tmp_path: Any) -> None:
    folder = tmp_path / "tied"
    shutil.copytree(tiny_llm.checkpoint("qwen2", tied=True), folder)
    for shard in folder.glob("encoder-*.safetensors"):
        shard.unlink()
    engine = tiny_llm.engine(folder=folder)
    lm = tiny_llm.reference_lm(folder)
    asked = tiny_llm.request(engine, text_sampler=False, max_tokens=8)
    expected, _ = reference_generate(lm, engine, asked, 8, None)
    assert tiny_llm.run(engine, [asked])["r"][0] == expected


@pytest.mark.parametrize("budget", [512, 20])  # with 20, some steps have upper chunks alone
def test_bfloat16_runs_and_halves_the_cache(budget: int) -> None:
    wide, narrow = tiny_llm.engine(), tiny_llm.engine(dtype=torch.bfloat16, max_batch_tokens=budget)
    results = [tiny_llm.run(e, [tiny_llm.request(e, max_tokens=6, text_sampler=False)])["r"] for e in (wide, narrow)]
    assert results[1][2].usage.kv_bytes * 2 == results[0][2].usage.kv_bytes
    assert len(results[1][0]) == 6
    assert narrow.cache.key.dtype == torch.bfloat16
    pruned = tiny_llm.run(narrow, [tiny_llm.request(narrow, threshold=0.5)])["r"][2].usage
    assert 0 < pruned.visual_tokens_kept < 40


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_sliding_windows_and_batch_dependent_rope_are_refused(family: str) -> None:
    from services.checkpoint.config import FocusLlavaConfig
    from services.checkpoint.supported import check_decoder

    config = FocusLlavaConfig.load(tiny_llm.checkpoint(family)).text_config
    check_decoder(config)
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(InvalidInput, match="'dynamic'"):
        check_decoder(config)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    if family == "qwen2":  # the layers below max_window_layers have no window
        window = {"sliding_window": 512, "use_sliding_window": True, "max_window_layers": config.num_hidden_layers}
        check_decoder(type(config)(**window, num_hidden_layers=config.num_hidden_layers))
        config.use_sliding_window, config.layer_types = True, ["sliding_attention"] * config.num_hidden_layers
    config.sliding_window = 512
    with pytest.raises(InvalidInput, match="text.sliding_window: is 512, .* 2048"):
        check_decoder(config)
