"""The public easy-VQA set (MIT licence, PyPI package `easy-vqa`): 64 px images of one shape, and questions on them.

Its training split is a stage's `data: easy_vqa`; its test split is what `evaluation/easy_vqa_score.py` reports.
"""

from __future__ import annotations

import importlib
import json
import pathlib
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

from PIL import Image

from services.common.errors import InvalidInput
from services.common.media import open_image
from training.data.questions import QuestionAnswer

EasyVqaSplit = Literal["train", "test"]
IMAGES: dict[EasyVqaSplit, int] = {"train": 4000, "test": 1000}
QUESTIONS: dict[EasyVqaSplit, int] = {"train": 38575, "test": 9673}
EASY_VQA_KINDS: tuple[str, ...] = ("shape", "colour", "presence", "absence")
FITS: frozenset[tuple[str, str]] = frozenset({("presence", "yes"), ("absence", "no")})
"""Kind and answer of questions that name what is there."""


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
    """A question's kind, one of EASY_VQA_KINDS: the set itself names none."""
    words = question.rstrip("?").split()
    if words[0] == "what":
        return "colour" if "color" in words else "shape"
    return "absence" if {"no", "not"} & set(words) else "presence"


@dataclass(frozen=True, kw_only=True)
class EasyVqaScene:
    """An image of the set as a scene that a SceneSource gives."""

    file: bytes
    asked: tuple[QuestionAnswer, ...]
    size_wh: tuple[int, int] = (64, 64)
    render_scale: float = 1.0


def easy_vqa_at(
    split: EasyVqaSplit, seed: int, index: int, accept: Callable[[EasyVqaScene], bool] = lambda _: True
) -> EasyVqaScene:
    """Image `index` of an endless stream: each pass over the split has its own order.

    All images have one size. Raises InvalidInput when `accept`, a curriculum's say on sizes, refuses it.
    """
    scenes = _scenes(split)
    epoch, within = divmod(index, len(scenes))
    scene = scenes[_order(split, seed, epoch)[within]]
    if not accept(scene):
        raise InvalidInput("no image of easy-VQA is as small as the curriculum asks for", field="curriculum.max_tiles")
    return scene


def easy_vqa_asked(scene: EasyVqaScene, rng: random.Random) -> list[QuestionAnswer]:
    """Questions for training: of those answered by yes or no, as many that name what is there as that do not.

    In the set five in six ask for a colour or shape that is not there: asked as they come, a model that had learned to
    name the shapes still answered them without looking. One is left where none names it; scores use them all.
    """
    fits = [question for question in scene.asked if (question.kind, question.answer) in FITS]
    named = [question for question in scene.asked if question.kind not in ("presence", "absence")]
    others = [question for question in scene.asked if question not in fits and question not in named]
    return [*named, *fits, *rng.sample(others, min(len(others), max(1, len(fits))))]


def open_easy_vqa(scene: EasyVqaScene) -> Image.Image:
    """The RGB image, decoded as the server decodes it."""
    return open_image(scene.file).image


@lru_cache(maxsize=1)
def _scenes(split: EasyVqaSplit) -> list[EasyVqaScene]:
    return [EasyVqaScene(file=file, asked=tuple(asked)) for file, asked in easy_vqa(split)]


@lru_cache(maxsize=2)
def _order(split: EasyVqaSplit, seed: int, epoch: int) -> list[int]:
    order = list(range(IMAGES[split]))
    random.Random(f"easy_vqa/{split}/{seed}/{epoch}").shuffle(order)
    return order


def _installed() -> pathlib.Path:
    try:
        package: Any = importlib.import_module("easy_vqa")
    except ImportError as error:
        raise InvalidInput("is not installed; pip install easy-vqa", field="easy-vqa") from error
    return pathlib.Path(package.__file__).parent / "data"
