"""What scores without looking: baselines with their fallbacks, exact match by kind, and the loader of easy-VQA."""

import json
import sys

import pytest

from evaluation.baselines import Baselines, form_of
from evaluation.scenes import exact_match, is_exact, training_questions
from services.common.errors import InvalidInput
from training.data.easy_vqa import EASY_VQA_KINDS, IMAGES, QUESTIONS, easy_vqa, kind_of
from training.data.questions import QuestionAnswer


def _asked(kind: str, question: str, answer: str) -> QuestionAnswer:
    return QuestionAnswer(kind=kind, question=question, answer=answer, box_xyxy=None)


def test_a_question_falls_back_to_its_form_then_to_its_kind():
    training = [_asked("number", "Read the red card.", "11")] * 5
    training += [_asked("number", "Read the blue card.", "22")] * 4
    training += [_asked("number", "Read the cyan card.", "22")] * 4
    training += [_asked("number", "Which number?", "33")] * 10 + [_asked("word", "Which word?", "cat")] * 11
    baselines = Baselines(training)
    guesses = {
        question: baselines.question_only(_asked("number", question, ""))
        for question in ("Read the red card.", "Read the blue card.", "Read the pink card.", "What is it?")
    }
    # Seen five times; seen four times, so its form decides; only its form was seen; neither was.
    assert list(guesses.values()) == ["11", "22", "22", "33"]
    assert baselines.majority(_asked("number", "Read the red card.", "")) == "33"
    assert baselines.question_only(_asked("new", "What is it?", "")) == "cat"


def test_ties_do_not_depend_on_the_order_of_training():
    training = [_asked("number", "Which?", answer) for answer in ("31", "12", "31", "12")]
    assert {Baselines(order).majority(training[0]) for order in (training, training[::-1])} == {"12"}
    with pytest.raises(ValueError, match="asked"):
        Baselines([])


def test_forms_take_out_what_varies():
    assert form_of("What number is in row cat, column B of the table?") == (
        "What number is in row <word>, column B of the table?"
    )
    assert form_of("What colour is the card that says 47?") == "What colour is the card that says <number>?"
    assert form_of("Is the red card left of the star?") == "Is the <colour> card left of the <shape>?"


def test_baselines_of_the_benchmark_are_near_chance():
    training = list(training_questions(600))
    baselines, unseen = Baselines(training[: 500 * 8]), training[500 * 8 :]
    for guess in (baselines.majority, baselines.question_only):
        scores = exact_match(unseen, map(guess, unseen))
        assert scores["all"].asked == 800 and scores["fine"].asked + scores["coarse"].asked == 800
        assert scores["fine"].percent < 12 and 20 < scores["coarse"].percent < 45


def test_exact_match_counts_by_kind_and_group():
    asked = [_asked("number", "a", "47"), _asked("number", "b", "12"), _asked("where", "c", "top left")]
    scores = exact_match(asked, ["47", "13", " Top left. "])
    assert {name: (tally.right, tally.asked) for name, tally in scores.items()} == {
        "all": (2, 3), "coarse": (1, 1), "fine": (1, 2), "number": (1, 2), "where": (1, 1),
    }  # fmt: skip
    assert scores["number"].percent == 50
    assert is_exact("Red.", "red") and not is_exact("it is red", "red") and not is_exact("", "red")
    with pytest.raises(ValueError):
        exact_match(asked, ["47"])
    assert exact_match([], []) == {}


def _write_easy_vqa(folder, images: int, questions: int) -> None:
    """The layout of the package's data folder."""
    (folder / "test" / "images").mkdir(parents=True)
    for number in range(images):
        (folder / "test" / "images" / f"{number}.png").write_bytes(f"file {number}".encode())
    listed = [[f"what color is shape {n}?", "red", n % images] for n in range(questions)]
    (folder / "test" / "questions.json").write_text(json.dumps(listed))


def test_easy_vqa_keeps_images_with_their_questions(tmp_path):
    _write_easy_vqa(tmp_path, IMAGES["test"], QUESTIONS["test"])
    loaded = easy_vqa("test", tmp_path)
    assert len(loaded) == 1000 and sum(len(asked) for _, asked in loaded) == 9673
    file, asked = loaded[20]
    assert file == b"file 20" and [q.question for q in asked][:2] == [f"what color is shape {n}?" for n in (20, 1020)]


@pytest.mark.parametrize(("images", "questions", "named"), [(999, 9673, "999 images"), (1000, 9000, "9000 questions")])
def test_easy_vqa_of_another_size_is_refused(tmp_path, images, questions, named):
    _write_easy_vqa(tmp_path, images, questions)
    with pytest.raises(InvalidInput, match=named):
        easy_vqa("test", tmp_path)


def test_easy_vqa_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(InvalidInput, match="pip install easy-vqa"):
        easy_vqa("test")
    with pytest.raises(InvalidInput, match=r"questions\.json is not there"):
        easy_vqa("train", tmp_path)
    with pytest.raises(InvalidInput, match="split: .*'val'"):
        easy_vqa("val")  # type: ignore[arg-type]


def test_kinds_of_easy_vqa():
    kinds = [
        kind_of(question)
        for question in (
            "what is the blue shape?",
            "what is the color of the shape?",
            "is a teal shape present?",
            "is there not a circle in the image?",
        )
    ]
    assert tuple(kinds) == EASY_VQA_KINDS
    assert kind_of("is no circle present?") == "absence" and kind_of("what shape is present?") == "shape"
