"""What one request may ask, how its answer ends, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from services.common.errors import InvalidInput, TooLarge, WrongFingerprint
from services.common.int8 import from_int8, to_int8
from services.common.types import GenerateRequest
from services.llm.prefix import image_digest
from tests import tiny_llm


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
        ({"tokens_ND": torch.ones(3, 64, dtype=torch.int8)}, InvalidInput, "int8"),
        (
            {"tokens_ND": torch.ones(3, 64, dtype=torch.int8), "scales_NG": torch.full((3, 1), float("nan"))},
            InvalidInput,
            "NaN",
        ),
        ({"tokens_ND": torch.full((3, 64), float("nan"))}, InvalidInput, "NaN"),
        ({"tokens_ND": torch.full((3, 64), float("inf"), dtype=torch.bfloat16)}, InvalidInput, "infinity"),
    ],
)
def test_visual_tokens_that_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    engine = tiny_llm.engine()
    asked = tiny_llm.request(engine, images=(5, 5))
    bad = tiny_llm.image(engine.fingerprint, 5, **changes)
    with pytest.raises(error, match=message):
        engine.submit(GenerateRequest(**{**vars(asked), "images": (asked.images[0], bad)}))
    assert not engine.has_work()


def test_int8_tokens_are_answered_as_their_values_are() -> None:
    engine = tiny_llm.engine()
    asked = tiny_llm.request(engine, images=(20,), max_tokens=12)
    tokens_ND, scales_NG = to_int8(torch.randn(20, 64, generator=torch.Generator().manual_seed(3)))
    small = tiny_llm.image(engine.fingerprint, 20, tokens_ND=tokens_ND, scales_NG=scales_NG)
    whole = tiny_llm.image(engine.fingerprint, 20, tokens_ND=from_int8(tokens_ND, scales_NG, torch.float32))
    doubled = tiny_llm.image(engine.fingerprint, 20, tokens_ND=tokens_ND, scales_NG=2 * scales_NG)
    answers = [
        tiny_llm.run(engine, [GenerateRequest(**{**vars(asked), "images": (image,)})])["r"][0]
        for image in (small, whole, doubled)
    ]
    assert answers[0] == answers[1]
    assert len({image_digest(image) for image in (small, whole, doubled)}) == 3, "no prefix is shared by mistake"


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
        TooLarge, match=r"prompt of \d+ tokens and up to 500 new ones need \d+ bytes .* has \d+, \d+ tokens;"
    ) as error:
        engine.submit(tiny_llm.request(engine, max_tokens=500))
    needed, has = (
        int(word) for word in str(error.value).replace(",", "").split() if word.isdigit() and int(word) > 6e4
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
    assert usage.kv_bytes == usage.kv_unpruned_bytes
    assert usage.converted_share == 1.0
