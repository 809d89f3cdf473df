"""A question as the client writes it, turned into what the two stages take."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Unpack

from focusllava.errors import FocusClientError
from focusllava.messages import ImageFile, Settings, Turn
from focusllava.wire import build_request
from services.common import wire
from services.common.errors import FocusError, InvalidInput, TooLarge
from services.common.ranges import check_map_share
from services.common.types import GenerateRequest, ImageOptions, ImagePart, PromptTurn, TextPart


@dataclass(frozen=True, kw_only=True)
class AskedImage:
    """An image file and all that decides which visual tokens it becomes; equal ones become the same."""

    data: bytes
    vision_sampler: bool
    options: ImageOptions


@dataclass(frozen=True, kw_only=True)
class AskedRequest:
    """A request that waits for its images' visual tokens."""

    request: GenerateRequest
    images: tuple[AskedImage, ...]
    fields: tuple[str, ...]
    """Place of each image in the conversation, for messages."""


def read_request(turns: Sequence[Turn], **settings: Unpack[Settings]) -> AskedRequest:
    """Reads a conversation and its settings as the gateway reads them from the wire.

    Raises InvalidInput or TooLarge naming the field, and TypeError for a setting that there is not.
    """
    with services_errors():
        message = build_request(turns, **settings)
    samplers = wire.samplers_from_proto(message.prune, vision_sampler=not message.vision_sampler_off)
    read: list[PromptTurn] = []
    images: list[AskedImage] = []
    fields: list[str] = []
    for index, turn in enumerate(turns):
        parts: list[TextPart | ImagePart] = []
        for number, part in enumerate(turn.parts):
            if isinstance(part, str):
                parts.append(TextPart(text=part))
                continue
            file = part if isinstance(part, ImageFile) else ImageFile(data=part)
            field = f"turns[{index}].parts[{number}].image"
            sent = message.turns[index].parts[number].image_options
            options = wire.image_options_from_proto(sent, f"{field}_options")
            check_map_share(options, samplers.vision_sampler, f"{field}_options")
            parts.append(ImagePart(image=len(images)))
            images.append(AskedImage(data=file.data, vision_sampler=samplers.vision_sampler, options=options))
            fields.append(field)
        read.append(PromptTurn(role=turn.role, parts=tuple(parts)))
    request = GenerateRequest(
        request_id=message.request_id or uuid.uuid4().hex,
        turns=tuple(read),
        sampling=wire.sampling_from_proto(message.sampling),
        samplers=samplers,
        continue_final_message=message.continue_final_message,
        return_decision=message.return_map,
    )
    return AskedRequest(request=request, images=tuple(images), fields=tuple(fields))


@contextlib.contextmanager
def services_errors() -> Iterator[None]:
    """Turns what the client's own functions raise into the services' errors."""
    try:
        yield
    except FocusClientError as error:
        field, _, message = error.message.partition(": ")
        kind: type[FocusError] = TooLarge if error.code == "RESOURCE_EXHAUSTED" else InvalidInput
        raise kind(message, field=field) from None
