"""A request of lmms-eval -> a question: its turns as our client writes them, its generation kwargs as our settings.

What cannot be honoured is refused by name: an answer to a question that was not asked must not enter a table.
"""

from __future__ import annotations

import io
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from focusllava.messages import Settings, Turn
from services.common.errors import InvalidInput
from services.common.ranges import check_sampling
from services.common.types import SamplingParams

DEFAULT_MAX_NEW_TOKENS = 1024
"""For tasks that set none, as lmms-eval's own models do."""

_SAMPLED = ("temperature", "top_p", "top_k")
"""Settings that change no greedy answer: tasks then leave values there that no draw accepts, such as top_p 0."""
_ALWAYS = ("repetition_penalty", "seed")
_ONLY: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "n": (1,),
    # The image as the task gives it. Anyres always follows; a model that could do without it would be another one.
    "image_aspect_ratio": ("original", "anyres"),
}
"""Settings that we have no choice of -> the values that say so."""
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One request, ready for either way of answering it."""

    name: str
    """task/split/document, for errors."""
    turns: tuple[Turn, ...]
    settings: Settings
    """Settings of the answer; those of the samplers are the same for every question of a run."""


class RequestFailed(RuntimeError):
    """A request that has no answer; ends the run, where an empty answer would end in the score."""

    def __init__(self, name: str, error: object):
        super().__init__(f"{name}: {error}")
        self.name = name


def sampling_settings(generation_kwargs: Mapping[str, Any]) -> Settings:
    """Generation kwargs of a task -> our settings. Raises InvalidInput naming the kwarg and its value.

    Greedy unless a temperature above 0 is given and `do_sample` does not forbid it; `do_sample` alone draws at 1.
    """
    given = dict(generation_kwargs)
    do_sample, temperature = given.pop("do_sample", None), given.get("temperature")
    if temperature is None:
        given["temperature"] = 1.0 if do_sample else 0.0
    greedy = do_sample is False or not given["temperature"]
    max_new_tokens, until = given.pop("max_new_tokens", None), given.pop("until", None)
    if max_new_tokens is not None and max_new_tokens < 1:
        raise InvalidInput(f"is {max_new_tokens}, expected 1 or more", field="generation_kwargs.max_new_tokens")
    settings: dict[str, Any] = {
        "max_tokens": DEFAULT_MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens,
        "stop": (until,) if isinstance(until, str) else tuple(until or ()),
    }
    for name in (*_SAMPLED, *_ALWAYS):
        value = given.pop(name, None)
        if value is not None and not (greedy and name in _SAMPLED):
            settings[name] = value
    for name, accepted in _ONLY.items():
        if (value := given.pop(name, None)) is not None and value not in accepted:
            raise InvalidInput(f"is {value!r}, expected {accepted[0]!r}", field=f"generation_kwargs.{name}")
    if given:
        name, value = next(iter(given.items()))
        known = ("do_sample", "max_new_tokens", "until", *_SAMPLED, *_ALWAYS, *_ONLY)
        raise InvalidInput(f"is {value!r}: unknown, expected {', '.join(known)}", field=f"generation_kwargs.{name}")
    check_sampling(SamplingParams(**settings), field="generation_kwargs")
    return Settings(**settings)  # type: ignore[typeddict-item]


def turns(messages: Sequence[Mapping[str, Any]]) -> tuple[Turn, ...]:
    """Chat messages (role, content a text or a list of text and image parts) -> turns.

    Raises InvalidInput: a part that is neither, or an image that is neither a picture nor a readable file.
    """
    return tuple(_turn(index, message) for index, message in enumerate(messages))


def _turn(index: int, message: Mapping[str, Any]) -> Turn:
    content = message["content"]
    if isinstance(content, str):
        return Turn(role=message["role"], parts=(content,))
    parts: list[str | bytes] = []
    for number, part in enumerate(content):
        field = f"messages[{index}].content[{number}]"
        if part["type"] == "text":
            parts.append(part["text"])
        elif part["type"] == "image":
            parts.append(image_file(part["url"], field))
        else:
            raise InvalidInput(f"is of type {part['type']!r}, expected text or image", field=field)
    return Turn(role=message["role"], parts=tuple(parts))


def image_file(image: object, field: str = "image") -> bytes:
    """A picture as PNG, without loss, or the bytes of the file that a path names. Raises InvalidInput."""
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        picture = image if image.mode in _PNG_MODES else image.convert("RGB")
        picture.save(file, "PNG", compress_level=1, exif=image.getexif())
        return file.getvalue()
    if isinstance(image, str | pathlib.Path):
        try:
            return pathlib.Path(image).read_bytes()
        except OSError as error:
            raise InvalidInput(f"is {str(image)!r}, which cannot be read: {error.strerror}", field=field) from None
    raise InvalidInput(f"is a {type(image).__name__}, expected a PIL image or a path", field=field)
