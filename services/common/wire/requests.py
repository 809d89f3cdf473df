"""What the LLM stage is asked <-> protobuf."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from focusllava.v1 import llm_pb2
from services.common.errors import InvalidInput, WrongFingerprint
from services.common.ranges import check_prune, check_sampling
from services.common.types import ChatTurn, GenerateRequest, ImagePart, PruneParams, SamplingParams, TextPart
from services.common.wire.tensors import check_sha256, tokens_from_proto, tokens_to_proto

_ROLES = {llm_pb2.ROLE_SYSTEM: "system", llm_pb2.ROLE_USER: "user", llm_pb2.ROLE_ASSISTANT: "assistant"}
_ROLE_VALUES = {role: value for value, role in _ROLES.items()}


def sampling_to_proto(sampling: SamplingParams) -> llm_pb2.SamplingParams:
    return llm_pb2.SamplingParams(**vars(sampling))  # the fields bear the same names


def sampling_from_proto(message: llm_pb2.SamplingParams, field: str = "sampling") -> SamplingParams:
    """Unset fields take the defaults. Raises InvalidInput for a value out of its range."""
    params = SamplingParams(**_given(message), stop=tuple(message.stop), ignore_eos=message.ignore_eos)
    check_sampling(params, field)
    return params


def prune_to_proto(prune: PruneParams) -> llm_pb2.PruneParams:
    return llm_pb2.PruneParams(off=not prune.enabled, threshold=prune.threshold, keep_ratio=prune.keep_ratio)


def prune_from_proto(message: llm_pb2.PruneParams, field: str = "prune") -> PruneParams:
    """Raises InvalidInput for a threshold or a ratio outside (0, 1], or both at once."""
    params = PruneParams(**_given(message), enabled=not message.off)
    check_prune(params, field)
    return params


def _given(message: llm_pb2.SamplingParams | llm_pb2.PruneParams) -> dict[str, Any]:
    """The optional fields that are set. A float32 comes as the shortest decimal that is it: 0.85, not 0.8500000238."""
    given = {field.name: value for field, value in message.ListFields() if field.has_presence}
    return {name: float(str(np.float32(v))) if isinstance(v, float) else v for name, v in given.items()}


def turns_to_proto(turns: Sequence[ChatTurn]) -> list[llm_pb2.PromptTurn]:
    return [
        llm_pb2.PromptTurn(
            role=_ROLE_VALUES[turn.role],
            parts=[
                llm_pb2.PromptPart(text=part.text)
                if isinstance(part, TextPart)
                else llm_pb2.PromptPart(image_index=part.image)
                for part in turn.parts
            ],
        )
        for turn in turns
    ]


def turns_from_proto(
    messages: Sequence[llm_pb2.PromptTurn], num_images: int, field: str = "turns"
) -> tuple[ChatTurn, ...]:
    """Raises InvalidInput: no turns, a role or part that is not set, an image index that names no image."""
    if not messages:
        raise InvalidInput("is empty, expected at least one turn", field=field)
    turns = []
    for index, message in enumerate(messages):
        where = f"{field}[{index}]"
        if message.role not in _ROLES:
            raise InvalidInput(f"is {message.role}, expected one of {', '.join(_ROLE_VALUES)}", field=f"{where}.role")
        parts: list[TextPart | ImagePart] = []
        for number, part in enumerate(message.parts):
            kind = part.WhichOneof("part")
            if kind == "text":
                parts.append(TextPart(text=part.text))
            elif kind == "image_index" and part.image_index < num_images:
                parts.append(ImagePart(image=part.image_index))
            else:
                found = f"names image {part.image_index} of {num_images}" if kind else "is neither text nor image_index"
                raise InvalidInput(found, field=f"{where}.parts[{number}]")
        turns.append(ChatTurn(role=_ROLES[message.role], parts=tuple(parts)))
    return tuple(turns)


def generate_request_to_proto(request: GenerateRequest, model_fingerprint: str) -> llm_pb2.GenerateRequest:
    return llm_pb2.GenerateRequest(
        request_id=request.request_id,
        model_fingerprint=model_fingerprint,
        turns=turns_to_proto(request.turns),
        images=[tokens_to_proto(image) for image in request.images],
        sampling=sampling_to_proto(request.sampling),
        prune=prune_to_proto(request.prune),
    )


def generate_request_from_proto(message: llm_pb2.GenerateRequest) -> GenerateRequest:
    """Raises InvalidInput naming the field, WrongFingerprint for an image of another checkpoint than the request's."""
    if not message.request_id:
        raise InvalidInput("is empty", field="request_id")
    check_sha256(message.model_fingerprint, "model_fingerprint")
    images = tuple(tokens_from_proto(image, f"images[{index}]") for index, image in enumerate(message.images))
    for index, image in enumerate(images):
        if image.model_fingerprint != message.model_fingerprint:
            raise WrongFingerprint(
                f"is {image.model_fingerprint}, the request is for {message.model_fingerprint}",
                field=f"images[{index}].model_fingerprint",
            )
    return GenerateRequest(
        request_id=message.request_id,
        turns=turns_from_proto(message.turns, len(images)),
        images=images,
        sampling=sampling_from_proto(message.sampling),
        prune=prune_from_proto(message.prune),
    )
