"""What goes into a question and comes out of an answer, and its translation to the wire."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO, TypedDict

from focusllava.errors import FocusClientError
from focusllava.v1 import focus_pb2, llm_pb2

ImageSource = str | os.PathLike[str] | bytes | BinaryIO
"""A path, the bytes of an image file, or an open binary file."""
Images = ImageSource | list[ImageSource] | tuple[ImageSource, ...] | None
"""One image, several, or none."""

_ROLES = {
    "system": llm_pb2.ROLE_SYSTEM,
    "user": llm_pb2.ROLE_USER,
    "assistant": llm_pb2.ROLE_ASSISTANT,
}
_FINISH_REASONS = {
    llm_pb2.FINISH_REASON_STOP: "stop",
    llm_pb2.FINISH_REASON_LENGTH: "length",
    llm_pb2.FINISH_REASON_ABORT: "abort",
}


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of a conversation; a part is words or the bytes of an image file."""

    role: str
    parts: tuple[str | bytes, ...]


def user(text: str, *, images: Sequence[ImageSource] = ()) -> Turn:
    """A user's turn: the images, then the words. Raises FocusClientError where an image cannot be read."""
    return Turn(role="user", parts=(*(read_image(image) for image in images), text))


def assistant(text: str) -> Turn:
    """An earlier answer."""
    return Turn(role="assistant", parts=(text,))


def system(text: str) -> Turn:
    """Instructions that stand before the conversation."""
    return Turn(role="system", parts=(text,))


@dataclass(frozen=True, kw_only=True)
class ImageInfo:
    """How the server read one image."""

    content_hash: str
    cached: bool
    """Its visual tokens came from the server's cache: the encoder did not run."""
    visual_tokens_uncompressed: int
    visual_tokens_sampled: int
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Accounting of one answer."""

    prompt_tokens: int
    completion_tokens: int
    visual_tokens_uncompressed: int
    """With both samplers off."""
    visual_tokens_sampled: int
    """After the vision-guided sampler: what layers 0..prune_layer-1 saw."""
    visual_tokens_kept: int
    """After the text-guided sampler: what the layers from prune_layer on saw."""
    prune_layer: int
    num_layers: int
    converted_share_percent: float
    """Converted remaining tokens (Sec. 4.4 of the paper), of the uncompressed count."""
    kv_bytes: int
    kv_unpruned_bytes: int
    time_to_first_token_ms: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A whole answer."""

    text: str
    finish_reason: str
    """stop, length or abort."""
    images: tuple[ImageInfo, ...]
    usage: Usage
    request_id: str


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The served model and its limits."""

    name: str
    model_fingerprint: str
    text_family: str
    num_layers: int
    prune_layer: int
    prune_threshold: float
    tile_px: int
    region_window: int
    max_context_tokens: int
    max_image_bytes: int
    max_images: int
    server_version: str


def read_image(source: ImageSource) -> bytes:
    """The bytes of an image file. Raises FocusClientError (INVALID_ARGUMENT) where it cannot be read."""
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, str | os.PathLike):
        try:
            with open(source, "rb") as file:
                return file.read()
        except OSError as error:
            raise FocusClientError(
                "INVALID_ARGUMENT", f"image: cannot read {os.fspath(source)!r}: {error.strerror or error}"
            ) from None
    data = source.read()
    if not isinstance(data, bytes):
        raise FocusClientError("INVALID_ARGUMENT", "image: the file was opened as text, open it in mode 'rb'")
    return data


def question_turn(images: Images, question: str) -> Turn:
    """A user's turn of one question and its images."""
    if images is None:
        images = ()
    return user(question, images=images if isinstance(images, list | tuple) else (images,))


class Settings(TypedDict, total=False):
    """How to answer: keyword arguments of `ask` and `chat`. What is left out takes the server's default."""

    max_tokens: int
    temperature: float
    """0 is greedy."""
    top_p: float
    seed: int
    """Makes draws repeatable."""
    stop: Sequence[str]
    """The answer ends before any of these."""
    threshold: float
    """gamma of Eq. 9, in (0, 1]; 1 keeps every visual token."""
    vision_sampler: bool
    text_sampler: bool
    ignore_eos: bool
    """For benchmarks: generate exactly max_tokens."""
    request_id: str
    """For the caller's own logs; the server makes one when empty."""


def build_request(
    turns: Sequence[Turn],
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
    threshold: float | None = None,
    vision_sampler: bool = True,
    text_sampler: bool = True,
    ignore_eos: bool = False,
    request_id: str = "",
) -> focus_pb2.ChatRequest:
    """The request on the wire; the arguments are those of Settings.

    Only what the wire cannot carry is refused here (INVALID_ARGUMENT); the server judges the rest.
    """
    for turn in turns:
        if turn.role not in _ROLES:
            raise FocusClientError("INVALID_ARGUMENT", f"turns.role: is {turn.role!r}, expected {', '.join(_ROLES)}")
    try:
        return focus_pb2.ChatRequest(
            turns=[
                focus_pb2.ChatTurn(
                    role=_ROLES[turn.role],
                    parts=[
                        focus_pb2.ChatPart(image=part) if isinstance(part, bytes) else focus_pb2.ChatPart(text=part)
                        for part in turn.parts
                    ],
                )
                for turn in turns
            ],
            sampling=llm_pb2.SamplingParams(
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                stop=stop,
                ignore_eos=ignore_eos,
            ),
            prune=llm_pb2.PruneParams(off=not text_sampler, threshold=threshold),
            vision_sampler_off=not vision_sampler,
            request_id=request_id,
        )
    except (ValueError, TypeError) as error:  # a negative seed, a number where words belong
        raise FocusClientError("INVALID_ARGUMENT", str(error)) from None


class AnswerState:
    """What a stream has brought so far: both clients feed it every event."""

    def __init__(self) -> None:
        self.request_id = ""
        self.text = ""
        self.images: tuple[ImageInfo, ...] = ()
        self.finish_reason = ""
        self.usage: Usage | None = None

    def take(self, event: focus_pb2.ChatResponse) -> str:
        """The event's new text, which may be empty. Raises FocusClientError on an error event."""
        kind = event.WhichOneof("event")
        if kind == "token":
            self.text += event.token.text
            return event.token.text
        if kind == "started":
            self.request_id = event.started.request_id
            self.images = tuple(_image_info(image) for image in event.started.images)
        elif kind == "finished":
            self.finish_reason = _FINISH_REASONS.get(event.finished.reason, "unspecified")
            self.usage = _usage(event.finished.usage)
        elif kind == "error":
            raise FocusClientError(event.error.code or "INTERNAL", event.error.message)
        return ""

    def answer(self) -> Answer:
        """The whole answer. Raises FocusClientError (INTERNAL) where the stream broke off."""
        if self.usage is None:
            raise FocusClientError("INTERNAL", "the stream broke off before its finished event")
        return Answer(
            text=self.text,
            finish_reason=self.finish_reason,
            images=self.images,
            usage=self.usage,
            request_id=self.request_id,
        )


def _image_info(image: focus_pb2.ImageInfo) -> ImageInfo:
    return ImageInfo(
        content_hash=image.content_hash,
        cached=image.cached,
        visual_tokens_uncompressed=image.visual_tokens_uncompressed,
        visual_tokens_sampled=image.visual_tokens_sampled,
        notes=tuple(image.notes),
    )


def _usage(usage: llm_pb2.Usage) -> Usage:
    return Usage(**{field: getattr(usage, field) for field in Usage.__dataclass_fields__})


def model_info(response: focus_pb2.GetModelInfoResponse) -> ModelInfo:
    return ModelInfo(**{field: getattr(response, field) for field in ModelInfo.__dataclass_fields__})
