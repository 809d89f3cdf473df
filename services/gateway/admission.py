"""Decides whether a ChatRequest may enter, before any stage is troubled, and turns it into what the stages take."""

from __future__ import annotations

import dataclasses
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from focusllava.v1 import focus_pb2, llm_pb2
from services.common import wire
from services.common.errors import InvalidInput, TooLarge
from services.common.media import MediaLimits, check_image, content_hash
from services.common.ranges import check_map_share
from services.common.settings import require
from services.common.types import ImageOptions, SamplerSettings
from services.gateway.turns import Load

CHARS_PER_TOKEN = 4
"""Characters of a text for which one token is counted before anything is tokenised."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:\-]{0,127}")


@dataclass(frozen=True, kw_only=True)
class AdmissionLimits:
    """The public door's limits."""

    media: MediaLimits = field(default_factory=MediaLimits)
    max_images: int = 8
    max_image_bytes_total: int = 64 * 2**20
    """Most bytes of all images of one request together."""
    max_turns: int = 64
    max_question_chars: int = 8_192
    """Most characters of the last user turn."""
    max_text_chars: int = 65_536
    """Most characters of all turns together, or of a raw prompt; one of token ids may have as many tokens."""
    max_tokens: int = 4_096
    """Most tokens that one request may ask for. One that asks for no number gets no more either."""
    running: Load = Load(requests=128, tokens=1_000_000, tiles=1_280)
    """Most that is at the stages at once; what is beyond waits for its turn."""
    waiting: Load = Load(requests=256, tokens=2_000_000, tiles=2_560)
    """Most that waits; what is beyond is refused."""
    held_bytes: int = 2**30
    """Most bytes of bodies being read and of requests under way, together."""

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if isinstance(value, Load):
                for part in fields(value):
                    amount = getattr(value, part.name)
                    require(amount >= 1, f"{limit.name}.{part.name}", amount, "1 or more")
            else:
                require(limit.name == "media" or value >= 1, limit.name, value, "1 or more")  # media checks its own


@dataclass(frozen=True, kw_only=True)
class ImageSizes:
    """The most that an image can become with the served checkpoint."""

    tiles: int
    tile_tokens: int


@dataclass(frozen=True, kw_only=True)
class AdmittedImage:
    """One image that passed its header check."""

    data: bytes
    content_hash: str
    field: str
    """Its place in the request, for messages."""
    options: ImageOptions = ImageOptions()

    def with_map_share(self, share: float | None) -> AdmittedImage:
        """The image, to be read with this `map_share`."""
        return dataclasses.replace(self, options=dataclasses.replace(self.options, map_share=share))


@dataclass(frozen=True, kw_only=True)
class AdmittedChat:
    """A request that may enter."""

    request_id: str
    turns: tuple[llm_pb2.PromptTurn, ...]
    images: tuple[AdmittedImage, ...]
    sampling: llm_pb2.SamplingParams
    samplers: SamplerSettings
    continue_final_message: bool
    raw_prompt: llm_pb2.RawPrompt | None
    """The prompt that stands in place of turns, if one does."""
    return_map: bool
    """What the samplers choose is sent to the caller."""

    def load(self, sizes: ImageSizes) -> Load:
        """What the request weighs, at most where its images are concerned: nothing is tokenised or decoded here."""
        tiles = sum(1 if image.options.detail == "low" else sizes.tiles for image in self.images)
        chars = sum(len(part.text) for turn in self.turns for part in turn.parts)
        ids = 0
        if self.raw_prompt is not None:
            chars, ids = len(self.raw_prompt.text), len(self.raw_prompt.token_ids.ids)
        answer = wire.sampling_from_proto(self.sampling).max_tokens
        return Load(tokens=chars // CHARS_PER_TOKEN + ids + tiles * sizes.tile_tokens + answer, tiles=tiles)


def request_id_of(request: focus_pb2.ChatRequest, offered: str = "") -> str:
    """The request's own id, else the one that is offered, if it is fit for a log line; otherwise a new one."""
    said = request.request_id or offered
    return said if _REQUEST_ID.fullmatch(said) else uuid.uuid4().hex


def admit(request: focus_pb2.ChatRequest, limits: AdmissionLimits, request_id: str) -> AdmittedChat:
    """Checks everything that can be checked without a stage.

    Raises:
        InvalidInput, TooLarge: naming the field, its value and what was expected.
    """
    if request.request_id and request.request_id != request_id:
        raise InvalidInput(
            "expected up to 128 letters, digits, '.', '_', ':' or '-', a letter or digit first", field="request_id"
        )
    sampling = _sampling(request, limits)
    samplers = wire.samplers_from_proto(request.prune, vision_sampler=not request.vision_sampler_off)
    raw_prompt = _raw_prompt(request, limits) if request.HasField("raw_prompt") else None
    turns, images = _turns(request, limits) if raw_prompt is None else ((), ())
    for image in images:
        check_map_share(image.options, samplers.vision_sampler, f"{image.field}_options")
    return AdmittedChat(
        request_id=request_id,
        turns=turns,
        images=images,
        sampling=sampling,
        samplers=samplers,
        continue_final_message=request.continue_final_message,
        raw_prompt=raw_prompt,
        return_map=request.return_map,
    )


def _sampling(request: focus_pb2.ChatRequest, limits: AdmissionLimits) -> llm_pb2.SamplingParams:
    """The request's settings, with as many tokens as the limit allows where the stage's default is more."""
    max_tokens = wire.sampling_from_proto(request.sampling).max_tokens  # the default when unset
    if max_tokens <= limits.max_tokens:
        return request.sampling
    if request.sampling.HasField("max_tokens"):
        raise TooLarge(f"is {max_tokens}, the limit is {limits.max_tokens}", field="sampling.max_tokens")
    sampling = llm_pb2.SamplingParams()
    sampling.CopyFrom(request.sampling)
    sampling.max_tokens = limits.max_tokens
    return sampling


def _raw_prompt(request: focus_pb2.ChatRequest, limits: AdmissionLimits) -> llm_pb2.RawPrompt:
    for name in ("turns", "continue_final_message"):
        if getattr(request, name):
            raise InvalidInput("is set beside raw_prompt, expected one of the two", field=name)
    prompt = wire.raw_prompt_from_proto(request.raw_prompt)
    if len(prompt) > limits.max_text_chars:
        what = "characters" if isinstance(prompt, str) else "tokens"
        raise TooLarge(f"has {len(prompt)} {what}, the limit is {limits.max_text_chars}", field="raw_prompt")
    return request.raw_prompt


def _turns(
    request: focus_pb2.ChatRequest, limits: AdmissionLimits
) -> tuple[tuple[llm_pb2.PromptTurn, ...], tuple[AdmittedImage, ...]]:
    if not request.turns:
        raise InvalidInput("is empty; send at least one user turn", field="turns")
    if len(request.turns) > limits.max_turns:
        raise TooLarge(f"has {len(request.turns)} turns, the limit is {limits.max_turns}", field="turns")
    turns: list[llm_pb2.PromptTurn] = []
    images: list[AdmittedImage] = []
    text_chars = image_bytes = 0
    for index, turn in enumerate(request.turns):
        where = f"turns[{index}]"
        _check_role(turn.role, where)
        if not turn.parts:
            raise InvalidInput("is empty", field=f"{where}.parts")
        parts: list[llm_pb2.PromptPart] = []
        for number, part in enumerate(turn.parts):
            name = f"{where}.parts[{number}]"
            kind = part.WhichOneof("part")
            if kind == "text":
                text_chars += len(part.text)
                parts.append(llm_pb2.PromptPart(text=part.text))
            elif kind == "image":
                if turn.role != llm_pb2.ROLE_USER:
                    raise InvalidInput("images may stand in user turns only", field=f"{name}.image")
                if len(images) == limits.max_images:
                    raise TooLarge(f"more than {limits.max_images} images", field=f"{name}.image")
                image_bytes += len(part.image)
                check_image(part.image, limits.media, f"{name}.image")
                options = wire.image_options_from_proto(part.image_options, f"{name}.image_options")
                parts.append(llm_pb2.PromptPart(image_index=len(images)))
                images.append(
                    AdmittedImage(
                        data=part.image,
                        content_hash=content_hash(part.image),
                        field=f"{name}.image",
                        options=options,
                    )
                )
            else:
                raise InvalidInput("holds neither text nor an image", field=name)
        turns.append(llm_pb2.PromptTurn(role=turn.role, parts=parts))
    if request.continue_final_message and request.turns[-1].role != llm_pb2.ROLE_ASSISTANT:
        raise InvalidInput("expects the last turn to be the assistant's", field="continue_final_message")
    _check_question(request.turns, limits)
    if text_chars > limits.max_text_chars:
        raise TooLarge(f"have {text_chars} characters of text, the limit is {limits.max_text_chars}", field="turns")
    if image_bytes > limits.max_image_bytes_total:
        raise TooLarge(
            f"have {image_bytes} bytes of images, the limit is {limits.max_image_bytes_total}", field="turns"
        )
    return tuple(turns), tuple(images)


def _check_role(role: int, where: str) -> None:
    if role not in (llm_pb2.ROLE_SYSTEM, llm_pb2.ROLE_USER, llm_pb2.ROLE_ASSISTANT):
        raise InvalidInput(f"is {role}, expected ROLE_SYSTEM, ROLE_USER or ROLE_ASSISTANT", field=f"{where}.role")


def _check_question(turns: Sequence[focus_pb2.ChatTurn], limits: AdmissionLimits) -> None:
    """Refuses an empty or too long question: the last user turn, or where there is none, the last turn."""
    last = len(turns) - 1
    asking = max((index for index, turn in enumerate(turns) if turn.role == llm_pb2.ROLE_USER), default=last)
    parts, where = turns[asking].parts, f"turns[{asking}]"
    if not any(part.image or part.text.strip() for part in parts):
        raise InvalidInput("the question is empty", field=f"{where}.parts")
    chars = sum(len(part.text) for part in parts)
    if chars > limits.max_question_chars:
        raise TooLarge(f"the question has {chars} characters, the limit is {limits.max_question_chars}", field=where)
