"""What goes into a question and comes out of an answer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO, TypedDict

from focusllava.errors import FocusClientError

ImageSource = str | os.PathLike[str] | bytes | BinaryIO
"""A path, the bytes of an image file, or an open binary file."""
Images = ImageSource | list[ImageSource] | tuple[ImageSource, ...] | None
"""One image, several, or none."""


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
class TokenLogprob:
    """A token and the natural logarithm of its probability, before penalties, temperature and limits of the draw."""

    token_id: int
    text: str
    """The token by itself; U+FFFD where it is only a part of a character."""
    logprob: float


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """One token of the answer and the likeliest ones at its place, most likely first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A whole answer."""

    text: str
    finish_reason: str
    """stop, length or abort."""
    images: tuple[ImageInfo, ...]
    usage: Usage
    request_id: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One a token generated, the end-of-answer token included, where the setting `logprobs` was given."""


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
    """How to answer: keyword arguments of `ask` and `chat`. What is left out or None takes the server's default.

    A draw goes through the penalties, temperature, top_k, top_p and min_p, in this order.
    """

    max_tokens: int | None
    temperature: float | None
    """In [0, 2]; 0 is greedy."""
    top_k: int | None
    """Draws from so many of the likeliest tokens; 0 is all."""
    top_p: float | None
    """In (0, 1]: draws from the fewest likeliest tokens whose probability reaches this."""
    min_p: float | None
    """In [0, 1]: leaves out tokens less likely than this share of the likeliest one's probability."""
    repetition_penalty: float | None
    """In (0, 2]: divides positive and multiplies negative logits of tokens in the prompt or the answer; 1 is off."""
    presence_penalty: float | None
    """In [-2, 2]: subtracted once from the logit of each token that the answer holds."""
    frequency_penalty: float | None
    """In [-2, 2]: subtracted from a token's logit for each time that the answer holds it."""
    seed: int | None
    """Makes draws repeatable."""
    logprobs: int | None
    """0 to 20: reports each token's log probability, and those of so many likeliest tokens beside it."""
    stop: Sequence[str]
    """The answer ends before any of these."""
    threshold: float | None
    """gamma of Eq. 9, in (0, 1]; 1 keeps every visual token."""
    keep_ratio: float | None
    """In (0, 1], in place of threshold: keeps this share of the visual tokens, the most important ones."""
    vision_sampler: bool
    text_sampler: bool
    ignore_eos: bool
    """For benchmarks: generate exactly max_tokens."""
    request_id: str
    """For the caller's own logs; the server makes one when empty."""
