"""The public easy-VQA set (MIT licence, PyPI package `easy-vqa`): 64 px images of one shape, and questions on them."""

from __future__ import annotations

import importlib
import json
import pathlib
from collections import defaultdict
from typing import Literal, get_args

from services.common.errors import InvalidInput
from training.data.questions import QuestionAnswer

EasyVqaSplit = Literal["train", "test"]
IMAGES: dict[EasyVqaSplit, int] = {"train": 4000, "test": 1000}
QUESTIONS: dict[EasyVqaSplit, int] = {"train": 38575, "test": 9673}
EASY_VQA_KINDS: tuple[str, ...] = ("shape", "colour", "presence", "absence")


def easy_vqa(split: EasyVqaSplit, data: pathlib.Path | None = None) -> list[tuple[bytes, list[QuestionAnswer]]]:
    """PNG files, by number, each with its questions in the set's order.

    `data` is the package's data folder, found when left out. Raises InvalidInput for an unknown split, when the package
    is not installed, and when images or questions are not as many as the set is known to have.
    """
    if split not in get_args(EasyVqaSplit):
        raise InvalidInput(f"must be 'train' or 'test', not {split!r}", field="split")
    folder = (data or _installed()) / split
    try:
        listed = json.loads((folder / "questions.json").read_text(encoding="utf8"))
    except FileNotFoundError as error:
        raise InvalidInput(f"{error.filename} is not there", field="easy-vqa") from error
    if len(listed) != QUESTIONS[split]:
        raise InvalidInput(f"{split} has {len(listed)} questions, not {QUESTIONS[split]}", field="easy-vqa")
    asked: dict[int, list[QuestionAnswer]] = defaultdict(list)
    for question, answer, image in listed:
        asked[image].append(QuestionAnswer(kind=kind_of(question), question=question, answer=answer, box_xyxy=None))
    files = {int(path.stem): path for path in (folder / "images").glob("*.png")}
    if len(files) != IMAGES[split] or files.keys() != asked.keys():
        raise InvalidInput(
            f"{split} has {len(files)} images and questions on {len(asked)}, not {IMAGES[split]}", field="easy-vqa"
        )
    return [(files[number].read_bytes(), asked[number]) for number in sorted(files)]


def kind_of(question: str) -> str:
    """One of EASY_VQA_KINDS: the set itself names none."""
    words = question.rstrip("?").split()
    if words[0] == "what":
        return "colour" if "color" in words else "shape"
    return "absence" if {"no", "not"} & set(words) else "presence"


def _installed() -> pathlib.Path:
    try:
        package = importlib.import_module("easy_vqa")
    except ImportError as error:
        raise InvalidInput("is not installed; pip install easy-vqa", field="easy-vqa") from error
    return pathlib.Path(str(package.__file__)).parent / "data"
