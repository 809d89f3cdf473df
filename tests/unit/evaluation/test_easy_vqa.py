"""easy-VQA from the installed package to training samples and scores; the package here is one with drawn stand-ins."""

import io
import itertools
import json
import random
import sys

import pytest
from PIL import Image

from evaluation.easy_vqa_score import TOLD
from evaluation.score import SAMPLERS, answers, baseline_scores, score, table
from services.common.errors import InvalidInput
from services.local.model import LocalModel
from tests.tiny_checkpoints import make_random_checkpoint
from tests.tiny_training import tiny_run
from training.data import easy_vqa as module
from training.data.easy_vqa import (
    IMAGES,
    QUESTIONS,
    EasyVqaScene,
    easy_vqa,
    easy_vqa_asked,
    easy_vqa_at,
    open_easy_vqa,
)
from training.data.questions import QuestionAnswer
from training.question_stage import QuestionTask

COLOURS = {"red": (220, 30, 30), "teal": (10, 128, 128), "brown": (120, 60, 20)}


def _png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), COLOURS[colour]).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A package of the real one's layout and size: image n shows the n-th colour, and every question names it."""
    root = tmp_path_factory.mktemp("site")
    names = list(COLOURS)
    files = [_png(name) for name in names]
    for split, count in IMAGES.items():
        images = root / "easy_vqa" / "data" / split / "images"
        images.mkdir(parents=True)
        for number in range(count):
            (images / f"{number}.png").write_bytes(files[number % 3])
        forms = ("what color is the shape?", "is there a {} shape?", "is there not a {} shape?")
        answers = ("{}", "yes", "no")
        listed = []
        for n in range(QUESTIONS[split]):
            image, form = n % count, n // count % 3
            name = names[image % 3]
            listed.append([forms[form].format(name), answers[form].format(name), image])
        (images.parent / "questions.json").write_text(json.dumps(listed))
    (root / "easy_vqa" / "__init__.py").write_text("")
    return root


@pytest.fixture
def installed(package, monkeypatch):
    monkeypatch.delitem(sys.modules, "easy_vqa", raising=False)
    monkeypatch.syspath_prepend(str(package))
    module._scenes.cache_clear()
    yield package
    module._scenes.cache_clear()
    sys.modules.pop("easy_vqa", None)


def test_every_pass_has_every_image_once_in_an_order_of_its_own(installed):
    count = IMAGES["train"]
    numbered = {id(scene): number for number, scene in enumerate(module._scenes("train"))}
    passes = [[numbered[id(easy_vqa_at("train", 5, index))] for index in range(n * count, (n + 1) * count)]
              for n in range(2)]  # fmt: skip
    assert all(sorted(order) == list(range(count)) for order in passes)
    assert passes[0] != passes[1] and passes[0] != list(range(count))
    assert [numbered[id(easy_vqa_at("train", 6, index))] for index in range(50)] != passes[0][:50]
    # A resumed run takes up where it stopped.
    module._order.cache_clear()
    assert numbered[id(easy_vqa_at("train", 5, count + 7))] == passes[1][7]


def test_an_image_too_large_for_the_curriculum_is_refused(installed):
    with pytest.raises(InvalidInput, match=r"curriculum\.max_tiles"):
        easy_vqa_at("train", 0, 0, accept=lambda scene: False)


@pytest.mark.parametrize(("fitting", "others_kept"), [(0, 1), (1, 1), (2, 2)])
def test_questions_answered_by_the_commoner_word_are_thinned_out(fitting, others_kept):
    def asked(kind: str, answer: str, count: int) -> list[QuestionAnswer]:
        return [QuestionAnswer(kind=kind, question=f"{kind} {n}?", answer=answer, box_xyxy=None) for n in range(count)]

    always = [*asked("colour", "teal", 2), *asked("presence", "yes", fitting)]
    others = [*asked("presence", "no", 4), *asked("absence", "yes", 3)]
    scene = EasyVqaScene(file=b"", asked=(*others, *always))
    seen = set()
    for seed in range(60):
        chosen = easy_vqa_asked(scene, random.Random(seed))
        assert chosen[: len(always)] == always and len(chosen) == len(always) + others_kept
        seen.update((question.kind, question.question) for question in chosen[len(always) :])
    assert len(seen) == len(others)


def test_a_stage_trains_on_the_training_split(installed, tmp_path):
    run = tiny_run(str(tmp_path / "out"), seed=3, stage={"data": "easy_vqa"})
    task = QuestionTask(run)
    _, samples = task.batch(2, 0, 1)
    assert len(samples) == run.samples_per_worker
    by_colour = {open_easy_vqa(scene).getpixel((0, 0)): scene for scene in module._scenes("train")}
    for sample in samples:
        assert sample.image.grid_hw == (1, 1) and sample.image.image_size_hw == (64, 64)
        pixel = tuple(round(float(x) * 127.5 + 127.5) for x in sample.image.pixels_T3HW[0, :, 48, 48])
        scene = by_colour[pixel]
        known = {(q.question, q.answer) for q in scene.asked}
        assert len(sample.branches) == 3
        for branch in sample.branches:
            asked = [i for i, own in zip(branch.token_ids, branch.instruction, strict=True) if own]
            answered = [i for i in branch.labels if i != -100]
            decode = task.tokenizer.decode
            pair = decode(asked).strip(), decode(answered, skip_special_tokens=True).strip()
            assert pair in known


def test_score_counts_by_kind_and_group(tmp_path):
    make_random_checkpoint(tmp_path, tile_px=28)
    model = LocalModel(tmp_path, "cpu", "float32")
    forms = {"colour": "what color is the shape?", "shape": "what is the red shape?", "presence": "is there a circle?"}
    file = _png("red")
    asked = [QuestionAnswer(kind=k, question=q, answer="?", box_xyxy=None) for k, q in forms.items()]
    said = [answer.text.strip() for answer in answers(model, file, asked, SAMPLERS["both"])]
    # The model's own words are the right answers to colour and presence, and something else is that to shape.
    right = [said[0], said[1] + "x", said[2]]
    data = [
        (file, [QuestionAnswer(kind=k, question=forms[k], answer=a, box_xyxy=None)])
        for k, a in zip(forms, right, strict=True)
    ]
    result = score(model, data, SAMPLERS["both"], told=TOLD)
    assert result["exact_percent"] == {
        "all": 66.67, "colour": 100, "presence": 100, "shape": 0, "what": 50, "yes or no": 100,
    }  # fmt: skip
    assert result["questions"] == {"all": 3, "colour": 1, "presence": 1, "shape": 1, "what": 2, "yes or no": 1}
    assert 0 < result["converted_percent"] <= result["sampled_percent"] < 100
    assert result["kept_percent"] <= result["sampled_percent"]
    header, _, row = table({"both": result}, TOLD.columns).splitlines()
    assert header.count("|") == row.count("|") == len(TOLD.columns) + 3
    assert row.endswith("| 66.67 | 50.0 | 100.0 | 0.0 | 100.0 | 100.0 | - |")


def test_baselines_see_training_answers_only(installed):
    training = [question for _, asked in easy_vqa("train")[:30] for question in asked]
    results = baseline_scores(easy_vqa("test")[:9], training, TOLD)
    # Three colours in ten images each: the first in the alphabet, and never more than one in three.
    for name in ("majority", "question only"):
        assert results[name]["exact_percent"]["colour"] == 33.33
        assert results[name]["exact_percent"]["presence"] == results[name]["exact_percent"]["absence"] == 100


def test_order_of_questions_is_the_sets_own(installed):
    kinds = [question.kind for question in easy_vqa("test")[4][1]]
    assert kinds == [kind for kind, _ in zip(itertools.cycle(("colour", "presence", "absence")), kinds, strict=False)]
