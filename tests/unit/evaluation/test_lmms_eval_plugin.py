"""The lmms-eval plug-in: what a request becomes, both ways of answering it, errors that name it, the paper's table."""

import dataclasses
import io
import json
import pathlib

import grpc
import numpy as np
import pytest
import yaml
from PIL import Image

from evaluation import lmms_eval_plugin
from evaluation.lmms_eval_plugin.answering import InProcess, Served
from evaluation.lmms_eval_plugin.example import make
from evaluation.lmms_eval_plugin.questions import Question, RequestFailed, image_file, sampling_settings, turns
from services.common.errors import InvalidInput
from services.common.types import SamplingParams
from services.local.model import LocalModel
from tests.fakes.gateway import ScriptedGateway
from tests.tiny_checkpoints import make_random_checkpoint

ROOT = pathlib.Path(__file__).parents[3]
EXAMPLE = pathlib.Path(lmms_eval_plugin.__file__).parent / "example"


def picture(seed: int, size: tuple[int, int] = (70, 50), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def asked(*parts, name: str = "task/test/0", **kwargs) -> Question:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "url": part} for part in parts
    ]
    kwargs = {"max_new_tokens": 4, "do_sample": False, **kwargs}
    return Question(name=name, turns=turns([{"role": "user", "content": content}]), settings=sampling_settings(kwargs))


# Generation kwargs. The first three are those of textvqa_val, pope_adv and mmvet.


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"until": ["ASSISTANT:"]}, SamplingParams(max_tokens=1024, stop=("ASSISTANT:",))),
        (
            {
                "max_new_tokens": 128,
                "temperature": 0,
                "top_p": 0,
                "num_beams": 1,
                "do_sample": False,
                "until": ["\n\n"],
            },
            SamplingParams(max_tokens=128, stop=("\n\n",)),
        ),
        ({"max_new_tokens": 9, "temperature": 0.2, "top_p": 1.0, "do_sample": False}, SamplingParams(max_tokens=9)),
        (
            {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 3, "max_new_tokens": 1, "until": "x"},
            SamplingParams(max_tokens=1, temperature=0.7, top_p=0.9, top_k=5, seed=3, stop=("x",)),
        ),
        ({"do_sample": True, "until": None}, SamplingParams(max_tokens=1024, temperature=1.0)),
        ({"image_aspect_ratio": "original", "top_p": None}, SamplingParams(max_tokens=1024)),
    ],
)
def test_generation_kwargs_become_our_settings(kwargs, expected):
    before = json.dumps(kwargs)
    assert SamplingParams(**sampling_settings(kwargs)) == expected
    assert json.dumps(kwargs) == before, "a task's kwargs are used again for its next request"


@pytest.mark.parametrize(
    ("kwargs", "field", "value"),
    [
        ({"length_penalty": 0.5}, "generation_kwargs.length_penalty", "0.5"),
        ({"num_beams": 3}, "generation_kwargs.num_beams", "3"),
        ({"image_aspect_ratio": "pad"}, "generation_kwargs.image_aspect_ratio", "'pad'"),
        ({"temperature": 5.0}, "generation_kwargs.temperature", "5.0"),
        ({"temperature": 1.0, "top_p": 0}, "generation_kwargs.top_p", "0"),
        ({"max_new_tokens": 0}, "generation_kwargs.max_new_tokens", "0"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(kwargs, field, value):
    with pytest.raises(InvalidInput) as refused:
        sampling_settings(kwargs)
    assert refused.value.field == field and value in str(refused.value)


# Messages.


def test_images_and_words_keep_their_order_and_every_pixel(tmp_path):
    file = tmp_path / "photo.jpg"
    picture(2).save(file)
    first = picture(1)
    (turn,) = asked(first, "Compare it", file, "with this.").turns
    assert turn.role == "user" and turn.parts[1::2] == ("Compare it", "with this.")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(turn.parts[0]))), np.asarray(first))
    assert turn.parts[2] == file.read_bytes(), "a file goes as it is, not encoded again"
    assert turns([{"role": "system", "content": "Be brief."}])[0].parts == ("Be brief.",)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_of_a_task_s_picture_can_be_sent(mode):
    image = picture(3, mode=mode)
    with Image.open(io.BytesIO(image_file(image))) as sent:
        assert sent.format == "PNG" and np.array_equal(
            np.asarray(sent.convert("RGB")), np.asarray(image.convert("RGB"))
        )


def test_other_media_and_missing_files_are_refused():
    for part, reason in (
        ({"type": "video", "url": "a.mp4"}, "'video'"),
        ({"type": "image", "url": "/nowhere/a.png"}, "/nowhere/a.png"),
        ({"type": "image", "url": 7}, "a int"),
    ):
        with pytest.raises(InvalidInput, match=reason) as refused:
            turns([{"role": "user", "content": [{"type": "text", "text": "?"}, part]}])
        assert refused.value.field == "messages[0].content[1]"


# In process.


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_random_checkpoint(folder)
    return LocalModel(folder, "cpu", "float32")


QUESTIONS = [
    asked(picture(1), "What is on the card?"),
    asked("What is two and two?"),
    asked(picture(1), picture(2, (40, 90)), "Which is larger?"),
    asked(picture(1), "What is on the card?"),
]


def test_a_batch_changes_nobody_s_answer_and_encodes_an_image_once(local, monkeypatch):
    pipeline = local.pipeline
    encoded = []
    encode = pipeline.encode
    monkeypatch.setattr(pipeline, "encode", lambda images, flags: encoded.append(len(images)) or encode(images, flags))
    model = InProcess(local, {})
    batched = model.answer(QUESTIONS)
    assert encoded == [2], "four questions, two distinct images"
    (again,) = model.answer(QUESTIONS[:1])
    assert encoded == [2], "the image of the batch before is kept"
    alone = [InProcess(local, {}).answer([question])[0] for question in QUESTIONS]
    for one, other in zip([*alone, again], [*batched, batched[0]], strict=True):
        assert (one.text, one.token_ids, counts(one)) == (other.text, other.token_ids, counts(other))
    assert batched[0].token_ids == batched[3].token_ids and batched[1].usage.visual_tokens_uncompressed == 0
    assert batched[2].usage.visual_tokens_uncompressed > batched[0].usage.visual_tokens_uncompressed
    assert all(answer.usage.completion_tokens for answer in batched)


def counts(answer):
    return dataclasses.replace(answer.usage, time_to_first_token_ms=0)


def test_the_samplers_are_those_of_the_arguments(local):
    def converted(**samplers) -> float:
        (answer,) = InProcess(local, samplers).answer(QUESTIONS[:1])
        return answer.usage.converted_share_percent

    assert converted(vision_sampler=False, text_sampler=False) == 100
    vision_alone = converted(text_sampler=False)
    assert vision_alone < 100 and converted(vision_sampler=False, keep_ratio=0.25) < 100
    assert converted(threshold=0.3) < converted(threshold=0.9) < vision_alone


def test_an_error_names_its_request_and_leaves_no_work_behind(local):
    engine = local.engine
    damaged = Question(name="task/test/7", turns=turns_of(b"no image"), settings={})
    beyond = dataclasses.replace(asked(picture(1), name="task/test/8"), settings={"stop_token_ids": [10**6]})
    for wrong in (damaged, beyond):
        with pytest.raises(RequestFailed, match=wrong.name) as failed:
            InProcess(local, {}).answer([QUESTIONS[0], wrong])
        assert isinstance(failed.value.__cause__, InvalidInput)
        assert not engine.has_work()
        engine.check_integrity()


def turns_of(image: bytes):
    (turn,) = asked("What?").turns
    return (type(turn)(role="user", parts=(image, *turn.parts)),)


# Through a gateway.


@pytest.fixture
def gateway():
    gateway = ScriptedGateway()
    yield gateway
    gateway.stop()


def test_a_gateway_is_asked_the_same(gateway):
    samplers = {"vision_sampler": False, "keep_ratio": 0.25}
    served = Served(gateway.address, samplers, timeout_s=10, api_key="secret")
    replies = served.answer([asked(picture(1), "Which?", until=["\n"]), asked("Two and two?", name="task/test/1")])
    served.close()
    assert [reply.text for reply in replies] == ["a red café"] * 2
    assert replies[0].usage.converted_visual_tokens == pytest.approx(30)
    request = next(request for request in gateway.requests if request.turns[0].parts[0].image)
    assert request.turns[0].parts[0].image == image_file(picture(1)) and request.turns[0].parts[1].text == "Which?"
    assert request.vision_sampler_off and request.prune.keep_ratio == 0.25 and not request.prune.HasField("threshold")
    assert request.sampling.max_tokens == 4 and request.sampling.temperature == 0 and request.sampling.stop == ["\n"]
    assert gateway.metadata[0]["authorization"] == "Bearer secret"


def test_a_gateway_s_refusal_is_raised_with_the_request_s_name(gateway):
    gateway.script = gateway.refusing(grpc.StatusCode.RESOURCE_EXHAUSTED, "sampling.max_tokens: is 4096")
    served = Served(gateway.address, {}, timeout_s=10, api_key=None)
    with pytest.raises(RequestFailed, match="task/test/3: RESOURCE_EXHAUSTED: sampling.max_tokens: is 4096"):
        served.answer([asked("What?", name="task/test/3")])
    served.close()


# The table, the entry point, the example.


def test_the_benchmarks_are_the_columns_of_the_paper_s_table():
    table = yaml.safe_load((ROOT / "evaluation" / "benchmarks.yaml").read_text(encoding="utf8"))
    rows = {row["column"]: row for row in table["benchmarks"]}
    assert list(rows) == ["VQAT", "SQA", "GQA", "POPE", "MM-Vet", "LLaVAW", "MMEP", "MMEC", "MMB", "MMBC"]
    llava_next = [69.4, 77.3, 65.7, 86.9, 40.6, 64.7, 1558, 334, 74.2, 70.1]
    focusllava = [70.0, 79.0, 66.0, 87.7, 41.3, 65.6, 1600, 328, 74.7, 70.3]
    assert [row["paper"]["llava_next"] for row in rows.values()] == llava_next
    assert [row["paper"]["focusllava"] for row in rows.values()] == focusllava
    assert all(row["traps"] and row["metric"] and row["scale"] in (1, 100) for row in rows.values())
    assert {column for column, row in rows.items() if "paper_200k" in row} == {"VQAT", "SQA", "GQA", "MMEP"}


def test_the_example_is_what_its_generator_draws(tmp_path):
    make.main(tmp_path)
    assert (tmp_path / "questions.jsonl").read_text() == (EXAMPLE / "questions.jsonl").read_text()
    for file in sorted(tmp_path.glob("*.png")):
        with Image.open(file) as drawn, Image.open(EXAMPLE / file.name) as shipped:
            assert np.array_equal(np.asarray(drawn), np.asarray(shipped))
