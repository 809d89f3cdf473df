"""An entry of LLaVA's or OpenAI's format to the turns of a conversation and its images.

LLaVA: {"image": path | [paths] | absent, "conversations": [{"from": "human" | "gpt", "value": text with <image>}]}.
OpenAI: {"messages": [{"role", "content": text | [{"type": "text", ...} | {"type": "image_url", ...}]}]}.

What LLaVA's trainer mends is mended: turns of the assistant's before anybody asked and questions without an answer at
the end are left out, and an image that no turn marks stands before the first question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.common.types import ImagePart, PromptTurn, TextPart
from training.data.faults import EntryFault

IMAGE_MARK = "<image>"
ROLES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant",
    "model": "assistant", "system": "system",
}  # fmt: skip
"""Names of roles in published data, and what each is here."""
_MARK = re.compile(rf"\n?{IMAGE_MARK}\n?")
_ON_ITS_OWN = re.compile(rf"\s*{IMAGE_MARK}\s*\n|.*\n\s*{IMAGE_MARK}\s*$|\s*{IMAGE_MARK}\s*$", re.DOTALL)
"""A mark that heads or ends a turn: there it is meant, whereas among other words it may be any text."""

ImageRef = str | bytes
"""An image's path, "data:" address, or the bytes of its file."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Turns that end with an answer, user and assistant in alternation, with system turns anywhere."""

    turns: tuple[PromptTurn, ...]
    images: tuple[ImageRef, ...]
    """Images in the order in which the turns have them."""

    @property
    def answers(self) -> int:
        return sum(turn.role == "assistant" for turn in self.turns)


@dataclass
class _Turn:
    """A turn that is being read: texts, and images not yet numbered."""

    role: str
    parts: list[str | _Image]

    def has_words(self) -> bool:
        return any(isinstance(part, str) and part.strip() for part in self.parts)


@dataclass(frozen=True)
class _Image:
    ref: ImageRef


def read_entry(raw: Any) -> Conversation:
    """The conversation of an entry. Raises EntryFault saying what is wrong with it."""
    if not isinstance(raw, Mapping):
        raise EntryFault("malformed", f"{_short(raw)} is not an object")
    images = [_image_ref(one) for one in _image_list(raw)]
    turns = [_read_turn(n, turn) for n, turn in enumerate(_turn_list(raw))]
    _place(turns, images)
    turns = _finished(turns)
    _check(turns)
    refs: list[ImageRef] = []
    made = []
    for turn in turns:
        parts: list[TextPart | ImagePart] = []
        for part in turn.parts:
            if isinstance(part, _Image):
                parts.append(ImagePart(image=len(refs)))
                refs.append(part.ref)
            else:
                parts.append(TextPart(text=part))
        made.append(PromptTurn(role=turn.role, parts=tuple(parts)))
    return Conversation(turns=tuple(made), images=tuple(refs))


def signed_words(raw: Any) -> int:
    """Words of an entry, negative if it has no image, as LLaVA groups by; never 0, whatever the entry is."""
    if not isinstance(raw, Mapping):
        return -1
    turns = raw.get("conversations", raw.get("messages"))
    words, has_image = 0, bool(raw.get("image") or raw.get("images"))
    for turn in turns if isinstance(turns, list) else ():
        said = turn.get("value", turn.get("content")) if isinstance(turn, Mapping) else None
        for part in said if isinstance(said, list) else (said,):
            if isinstance(part, Mapping):
                has_image |= part.get("type") in ("image", "image_url")
                part = part.get("text")
            if isinstance(part, str):
                words += len(part.split())
    return max(1, words) if has_image else -max(1, words)


def _image_list(raw: Mapping[str, Any]) -> Sequence[Any]:
    found = raw.get("image")
    found = raw.get("images") if found is None else found
    if found is None or found == "":
        return ()
    return found if isinstance(found, list | tuple) else (found,)


def _image_ref(found: Any) -> ImageRef:
    if isinstance(found, Mapping):  # how Parquet files of the hub hold an image
        found = found.get("bytes") or found.get("path")
    if not isinstance(found, str | bytes) or not found:
        raise EntryFault("malformed", f"{_short(found)} is not the path of an image")
    return found


def _turn_list(raw: Mapping[str, Any]) -> Sequence[Any]:
    name = "conversations" if raw.get("conversations") is not None else "messages"
    turns = raw.get(name)
    if isinstance(turns, str):  # a column of a Parquet file
        try:
            turns = json.loads(turns)
        except ValueError:
            raise EntryFault("malformed", f"`{name}` is a text that is not JSON") from None
    if not isinstance(turns, list) or not turns:
        raise EntryFault("malformed", f"`conversations` is {_short(turns)}, expected a list of turns")
    return turns


def _read_turn(index: int, turn: Any) -> _Turn:
    if not isinstance(turn, Mapping):
        raise EntryFault("malformed", f"turn {index} is {_short(turn)}, expected an object")
    who = turn.get("from", turn.get("role"))
    role = ROLES.get(who.lower()) if isinstance(who, str) else None
    if role is None:
        raise EntryFault("malformed", f"turn {index} is from {_short(who)}, expected one of {', '.join(ROLES)}")
    said = turn.get("value", turn.get("content"))
    if isinstance(said, str):
        return _Turn(role, [said.strip()])
    if isinstance(said, list):
        return _Turn(role, [_content_part(index, part) for part in said])
    raise EntryFault("malformed", f"turn {index} says {_short(said)}, expected a text")


def _content_part(index: int, part: Any) -> str | _Image:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind in ("image", "image_url"):
        found = part.get("image_url", part.get("image", part.get("path", part.get("url"))))
        return _Image(_image_ref(found.get("url") if isinstance(found, Mapping) and "url" in found else found))
    raise EntryFault("malformed", f"turn {index} has a part {_short(part)}, expected a text or an image")


def _finished(turns: list[_Turn]) -> list[_Turn]:
    """The turns without answers that nobody asked for and without questions that nobody answers."""
    asking = next((n for n, turn in enumerate(turns) if turn.role == "user"), len(turns))
    turns = [turn for n, turn in enumerate(turns) if n >= asking or turn.role == "system"]
    while turns and turns[-1].role != "assistant":
        turns.pop()
    if not turns:
        raise EntryFault("turn_order", "no question has an answer")
    return turns


def _place(turns: list[_Turn], images: list[ImageRef]) -> None:
    """Puts the entry's images where the users' turns mark them."""
    asked = [turn for turn in turns if turn.role == "user"]
    if any(isinstance(part, _Image) for turn in turns for part in turn.parts):  # OpenAI's parts
        if images:
            raise EntryFault("image_marks", f"{len(images)} images stand beside turns that have their own")
        return
    marks = sum(part.count(IMAGE_MARK) for turn in asked for part in turn.parts if isinstance(part, str))
    if not images:
        if any(_ON_ITS_OWN.match(str(part)) for turn in asked for part in turn.parts):
            raise EntryFault("image_marks", f"{marks} marks {IMAGE_MARK} and no image")
        return  # the words of a text about something else
    if not asked:
        raise EntryFault("turn_order", "nobody asks")
    if marks == 0:
        asked[0].parts[:0] = map(_Image, images)
    elif marks != len(images):
        raise EntryFault("image_marks", f"{marks} marks {IMAGE_MARK} for {len(images)} images")
    else:
        left = iter(images)
        for turn in asked:
            turn.parts = [piece for part in turn.parts for piece in _split(str(part), left)]


def _split(text: str, images: Any) -> list[str | _Image]:
    first, *others = _MARK.split(text)
    pieces: list[str | _Image] = [first]
    for other in others:
        pieces += [_Image(next(images)), other]
    return [piece for piece in pieces if piece != ""]


def _check(turns: list[_Turn]) -> None:
    said = [turn for turn in turns if turn.role != "system"]
    for n, turn in enumerate(said):
        if turn.role != ("user", "assistant")[n % 2]:
            raise EntryFault("turn_order", f"turn {n} is the {turn.role}'s again")
        if turn.role == "assistant" and any(isinstance(part, _Image) for part in turn.parts):
            raise EntryFault("image_marks", f"turn {n}, an answer, has an image")
        if turn.role == "assistant" and not turn.has_words():
            raise EntryFault("empty_answer", f"turn {n}, an answer, has no words")
        if turn.role == "user" and not turn.has_words() and not any(isinstance(p, _Image) for p in turn.parts):
            raise EntryFault("malformed", f"turn {n}, a question, has neither words nor an image")


def _short(value: Any) -> str:
    return f"{value!r:.60}"
