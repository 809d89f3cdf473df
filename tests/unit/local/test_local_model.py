"""LocalModel on the shipped checkpoint in float32: its answers are the stages' own, alone, batched and streamed."""

from __future__ import annotations

import gc
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from focusllava import assistant, system, user
from focusllava.cli import main
from focusllava.messages import Settings, read_image
from services.common.errors import InternalError, InvalidInput, StageUnavailable, TooLarge
from services.common.media import MediaLimits
from services.common.types import (
    FinishedEvent,
    GenerateRequest,
    ImageOptions,
    ImagePart,
    PromptTurn,
    SamplerSettings,
    SamplingParams,
    TextPart,
    TokenEvent,
)
from services.encoder.pipeline import EncoderPipeline
from services.llm.engine import Engine
from services.llm.engine_stats import StepFailed
from services.llm.settings import LanguageModelSettings
from services.local.images import ImageEncoder
from services.local.model import LocalModel
from services.local.request import AskedImage
from services.local.stream import LocalAnswer

ROOT = pathlib.Path(__file__).parents[3]
CHECKPOINT, SAMPLE = ROOT / "checkpoints" / "focusllava-tiny", ROOT / "docs" / "assets" / "sample.png"
RED, YELLOW = "What number is on the red card?", "What word is on the yellow card?"


@pytest.fixture(scope="module")
def model() -> Iterator[LocalModel]:
    with LocalModel(CHECKPOINT, "cpu", "float32") as model:
        yield model


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "model" in request.fixturenames:
        model = request.getfixturevalue("model")
        assert not model.engine.has_work()
        model.engine.check_integrity()


def picture(seed: int, size: tuple[int, int] = (120, 90)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*reversed(size), 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def same(one: LocalAnswer, other: LocalAnswer) -> bool:
    return (one.text, one.token_ids, one.finish_reason) == (other.text, other.token_ids, other.finish_reason)


def test_an_answer_is_that_of_the_two_stages(model: LocalModel) -> None:
    pipeline = EncoderPipeline.from_checkpoint(CHECKPOINT, dtype=torch.float32)
    engine = Engine.from_checkpoint(CHECKPOINT, dtype=torch.float32, kv_cache_bytes=2**26)
    cases: list[tuple[Settings, SamplingParams, SamplerSettings, str | None]] = [
        ({}, SamplingParams(), SamplerSettings(), None),
        ({"threshold": 0.8}, SamplingParams(), SamplerSettings(threshold=0.8), "low"),
        (
            {"keep_ratio": 0.5, "vision_sampler": False, "max_tokens": 5, "ignore_eos": True},
            SamplingParams(max_tokens=5, ignore_eos=True), SamplerSettings(keep_ratio=0.5, vision_sampler=False), None,
        ),
        (
            {"text_sampler": False, "temperature": 0.9, "seed": -1, "stop": "0", "map_share": 0.4},
            SamplingParams(temperature=0.9, seed=2**64 - 1, stop=("0",)), SamplerSettings(text_sampler=False), None,
        ),
    ]  # fmt: skip
    for settings, sampling, samplers, detail in cases:
        vision = samplers.vision_sampler
        answer = model.ask(SAMPLE, RED, detail=detail, **settings)
        options = ImageOptions(detail="low" if detail else "high", map_share=settings.get("map_share"))
        (tokens,) = pipeline.encode([pipeline.prepare(SAMPLE.read_bytes(), vision, options)], [vision])
        turn = PromptTurn(role="user", parts=(ImagePart(image=0), TextPart(text=RED)))
        request = GenerateRequest(request_id="r", turns=(turn,), images=(tokens,), sampling=sampling, samplers=samplers)
        sequence = engine.prepare(request)
        engine.enqueue(sequence)
        events = []
        while engine.has_work():
            events += [event for _, event in engine.step()]
        made = [event for event in events if isinstance(event, TokenEvent)]
        assert answer.text == "".join(event.text for event in made)
        assert list(answer.token_ids) == [token for event in made for token in event.token_ids]
        finished = events[-1]
        assert isinstance(finished, FinishedEvent) and answer.finish_reason == finished.reason
        for name in ("prompt_tokens", "completion_tokens", "visual_tokens_uncompressed", "visual_tokens_sampled",
                     "visual_tokens_kept", "prune_layer", "num_layers", "kv_bytes"):  # fmt: skip
            assert getattr(answer.usage, name) == getattr(finished.usage, name), name
        assert answer.usage.converted_visual_tokens == pytest.approx(finished.usage.converted_visual_tokens, rel=1e-12)
        assert answer.images[0].content_hash == tokens.content_hash and answer.images[0].notes == tokens.notes
        kept = range(sequence.num_visual) if sequence.decision is None else sequence.decision.kept.tolist()
        assert [part.tolist() for part in answer.kept] == [list(kept)]
    assert model.ask(SAMPLE, RED).text.strip() == "60"


def test_a_batch_and_open_streams_answer_as_each_alone(model: LocalModel) -> None:
    conversations = [
        [user(RED, images=SAMPLE)],
        [user("What is two and two?")],
        [user("Which is larger?", images=[picture(1), picture(2, (40, 150))])],
        [user(YELLOW, images=SAMPLE)],
        [system("Be brief."), user(RED, images=[picture(3, (9, 200))])],
    ]
    alone = [model.chat(turns, max_tokens=12) for turns in conversations]
    assert len({answer.token_ids for answer in alone}) > 2
    batched = model.generate(conversations * 8, max_tokens=12)  # more than run at a time
    assert len(batched) == 40 and all(map(same, batched, alone * 8))
    streams = [model.stream(turns, max_tokens=12) for turns in conversations]
    first = next(streams[3])  # the others advance with it
    assert streams[0].token_ids and not streams[0].ended
    pieces = ["".join(stream) for stream in streams]
    pieces[3] = first + pieces[3]
    assert pieces == [answer.text for answer in alone]
    assert all(same(stream.result(), answer) for stream, answer in zip(streams, alone, strict=True))


def test_streaming_gives_the_whole_answer_in_pieces(model: LocalModel) -> None:
    whole = model.ask(SAMPLE, RED, max_tokens=20, ignore_eos=True, logprobs=2)
    with model.stream([user(RED, images=SAMPLE)], max_tokens=20, ignore_eos=True, logprobs=2) as stream:
        assert stream.usage is None and stream.images == ()
        pieces = list(stream)
    assert len(pieces) > 2 and "".join(pieces) == stream.text == whole.text
    assert len(whole.logprobs) == 20 and whole.logprobs == stream.result().logprobs
    assert [entry.chosen.token_id for entry in whole.logprobs] == list(whole.token_ids)
    assert all(entry.chosen.text and len(entry.top) == 2 for entry in whole.logprobs)
    assert whole.usage.time_to_first_token_ms > 0


def test_a_follow_up_does_not_encode_again_and_keeps_other_tokens(model: LocalModel, monkeypatch) -> None:
    encoded: list[int] = []
    encode = model.pipeline.encode
    monkeypatch.setattr(model.pipeline, "encode", lambda images, on: encoded.append(len(images)) or encode(images, on))
    image = picture(11)
    turns = [user(RED, images=image)]
    first = model.chat(turns, max_tokens=4)
    follow_up = [*turns, assistant(first.text), user(YELLOW)]
    second = model.chat(follow_up, max_tokens=4)
    assert encoded == [1] and [answer.images[0].cached for answer in (first, second)] == [False, True]
    assert second.decision is not None and second.kept[0].tolist() != first.kept[0].tolist()
    assert same(second, model.ask(None, YELLOW, history=follow_up[:-1], max_tokens=4))
    model.ask(image, RED, vision_sampler=False, max_tokens=1)
    model.ask(image, RED, detail="low", max_tokens=1)
    assert encoded == [1, 1, 1], "another sampler and another detail are other visual tokens"
    model.generate([[user(RED, images=[image, picture(12)])], [user(YELLOW, images=picture(12))]], max_tokens=1)
    assert encoded == [1, 1, 1, 1], "one picture is new to both"


def test_kept_tokens_are_told_an_image(model: LocalModel) -> None:
    images = [SAMPLE, picture(21, (40, 90))]
    answer = model.ask(images, RED, keep_ratio=0.25)
    sampled = [image.visual_tokens_sampled for image in answer.images]
    assert answer.decision is not None and len(answer.kept) == 2
    assert [*answer.kept[0].tolist(), *(sampled[0] + answer.kept[1]).tolist()] == answer.decision.kept.tolist()
    assert sum(map(len, answer.kept)) == answer.usage.visual_tokens_kept < sum(sampled)
    text = model.ask(None, "What is two and two?", max_tokens=3)
    assert text.kept == () and text.images == () and text.usage.visual_tokens_uncompressed == 0
    whole = model.ask(images, RED, text_sampler=False)
    assert [len(part) for part in whole.kept] == [image.visual_tokens_sampled for image in whole.images]


def test_errors_name_the_field_and_leave_the_others_alone(model: LocalModel) -> None:
    wrong: list[tuple[dict, str, type]] = [
        ({"top_p": 7.0}, "sampling.top_p", InvalidInput),
        ({"seed": "x"}, "seed", InvalidInput),
        ({"threshold": 0.0}, "prune.threshold", InvalidInput),
        ({"regex": "("}, "sampling.constraint.regex", InvalidInput),
        ({"stop_token_ids": [10**6]}, "sampling.stop_token_ids[0]", InvalidInput),
    ]
    for settings, field, kind in wrong:
        with pytest.raises(kind) as refused:
            model.ask(SAMPLE, RED, **settings)
        assert refused.value.field == field and field in str(refused.value)
    for images, question, field in ((b"no image", RED, "turns[0].parts[0].image"), (None, " ", "turns[0]"),
                                    ("nowhere.png", RED, "images[0]")):  # fmt: skip
        with pytest.raises(InvalidInput) as refused:
            model.ask(images, question)
        assert refused.value.field == field
    with pytest.raises(TypeError, match="unknown settings: tokens"):
        model.ask(None, RED, tokens=3)  # type: ignore[call-arg]
    good, bad = model.stream([user(RED, images=SAMPLE)]), model.stream([user(RED, images=[SAMPLE, b"no image"])])
    assert good.result().text.strip() == "60"
    with pytest.raises(InvalidInput, match=r"turns\[0\]\.parts\[1\]\.image: "):
        bad.result()
    with pytest.raises(InvalidInput):
        model.generate([[user(RED, images=SAMPLE)], [user(RED, images=b"no image")], [user(YELLOW, images=SAMPLE)]])


def test_what_cannot_be_loaded_is_named(tmp_path: pathlib.Path) -> None:
    for arguments, settings, field in (
        ((tmp_path,), {}, "checkpoint"),
        ((CHECKPOINT, "nowhere"), {}, "device"),
        ((CHECKPOINT, "cpu", "int3"), {}, "dtype"),
        ((CHECKPOINT,), {"kv_cache": 1}, "kv_cache"),
        ((CHECKPOINT,), {"kv_cache_bytes": 1000}, "kv_cache_bytes"),
    ):  # fmt: skip
        with pytest.raises(InvalidInput) as refused:
            LocalModel(*arguments, **settings)
        assert refused.value.field == field
    with LocalModel(CHECKPOINT, "cpu", "float32", media=MediaLimits(max_bytes=100)) as model:
        with pytest.raises(TooLarge, match="turns"):
            model.ask(SAMPLE, RED)
    with pytest.raises(StageUnavailable, match="closed"):
        model.ask(None, RED)


def test_sizes_follow_from_the_checkpoint_as_in_serving(model: LocalModel) -> None:
    served = LanguageModelSettings(checkpoint=str(CHECKPOINT)).replica_sizes("cpu", torch.float32)
    assert model.engine.scheduler.max_running == served.max_running
    with LocalModel(CHECKPOINT, "cpu", "float32", max_running=2, max_model_len=900, prefix_reuse=False) as small:
        assert small.engine.scheduler.max_running == 2 and small.engine.decoder.context == 900
        assert not small.engine.cache.prefix_reuse
        answers = small.generate([[user(RED, images=SAMPLE)]] * 5)
    assert all(same(answer, model.ask(SAMPLE, RED)) for answer in answers)


def test_closing_and_dropping_a_stream_end_its_request(model: LocalModel) -> None:
    closed = model.stream([user(RED, images=SAMPLE)], max_tokens=50, ignore_eos=True)
    dropped = model.stream([user(RED, images=SAMPLE)], max_tokens=50, ignore_eos=True)
    never_begun = model.stream([user(RED, images=picture(31))])
    del never_begun
    next(closed), next(dropped)
    assert len(model.engine.scheduler.running) == 2
    closed.close()
    assert list(closed) == [] and len(model.engine.scheduler.running) == 1
    with pytest.raises(InternalError, match="closed before its end"):
        closed.result()
    del dropped
    gc.collect()
    assert model.ask(SAMPLE, RED).text.strip() == "60"
    assert not model.engine.has_work()


def test_a_step_that_fails_or_is_interrupted_ends_its_requests_alone(model: LocalModel, monkeypatch) -> None:
    runner = model.engine.runner
    for failure, expected in ((RuntimeError("broken"), StepFailed), (KeyboardInterrupt(), KeyboardInterrupt)):
        stream = model.stream([user(RED, images=SAMPLE)], max_tokens=9, ignore_eos=True)
        next(stream)
        with monkeypatch.context() as patched:
            patched.setattr(runner, "decode", lambda step, failure=failure: (_ for _ in ()).throw(failure))
            with pytest.raises(expected):
                stream.result()
        assert not model.engine.has_work()
        assert model.ask(SAMPLE, RED).text.strip() == "60"


def test_an_encoder_that_fails_leaves_requests_waiting(model: LocalModel, monkeypatch) -> None:
    stream = model.stream([user(RED, images=picture(41))], max_tokens=2)
    with monkeypatch.context() as patched:
        patched.setattr(model.pipeline, "encode", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(MemoryError):
            next(stream)
    assert stream.result().token_ids


def test_the_latest_visual_tokens_are_kept_within_bounds(model: LocalModel, monkeypatch) -> None:
    encoder = ImageEncoder(model.pipeline, max_tiles=20)
    files = [read_image(picture(seed)) for seed in range(4)]
    images = [AskedImage(data=file, vision_sampler=True, options=ImageOptions()) for file in files]
    one = encoder.encode(images[:1])[0][0].tokens_ND.nbytes + len(files[0])
    monkeypatch.setattr("services.local.images.KEPT_BYTES", int(2.5 * one))
    encoder.encode(images[1:3])
    encoder.encode(images[1:2])
    assert len(encoder.encode(images[3:])) == 1
    assert [encoder.is_kept(image) for image in images] == [False, True, False, True], "the least recent went"
    encoder.close()


def test_the_client_loads_it_when_it_is_named() -> None:
    code = (
        "import sys, focusllava\n"
        "light = not {'torch', 'services', 'numpy'} & sys.modules.keys()\n"
        "from focusllava import LocalModel\n"
        "print(light, LocalModel.__module__, 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True", "services.local.model", "True"]
    without = "import sys; sys.modules['torch'] = None\nfrom focusllava import LocalModel"
    run = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True)
    last = run.stderr.splitlines()[-1]
    assert run.returncode == 1 and last.startswith("ModuleNotFoundError") and "pip install 'focusllava[serve]'" in last


def test_ask_local_answers_without_a_server(model: LocalModel, capsys) -> None:
    question = ["ask", str(SAMPLE), RED, "--local", str(CHECKPOINT)]
    assert main(question) == 0
    out, err = capsys.readouterr()
    assert out.strip() == "60" and "464 uncompressed -> " in err and "kept from layer 3 of 6 on" in err
    assert main([*question, "--json", "--threshold", "0.8", "--logprobs", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    here = model.ask(SAMPLE, RED, threshold=0.8)
    assert told["usage"]["visual_tokens_sampled"] == here.usage.visual_tokens_sampled
    assert set(told) == {"text", "finish_reason", "images", "usage", "request_id", "token_ids", "logprobs"}
    assert main([*question, "--top-p", "7"]) == 3 and "sampling.top_p" in capsys.readouterr().err
    assert main([*question[:-1], "nowhere"]) == 3 and "no config.json in nowhere" in capsys.readouterr().err
