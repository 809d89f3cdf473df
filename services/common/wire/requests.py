"""Requests to the LLM stage <-> protobuf."""

from __future__ import annotations

from collections.abc import Sequence

from focusllava.v1 import llm_pb2
from services.common.errors import InvalidInput, WrongFingerprint
from services.common.ranges import check_samplers, check_sampling
from services.common.shelf import Shelf
from services.common.types import (
    Constraint,
    GenerateRequest,
    ImagePart,
    PromptTurn,
    SamplerSettings,
    SamplingParams,
    TextPart,
)
from services.common.wire.scalars import scalars, shortest
from services.common.wire.tensors import check_sha256, tokens_from_proto, tokens_to_proto

GenerateMessage = llm_pb2.GenerateRequest
"""The message, for those that only pass it on."""

_ROLES = {llm_pb2.ROLE_SYSTEM: "system", llm_pb2.ROLE_USER: "user", llm_pb2.ROLE_ASSISTANT: "assistant"}
_ROLE_VALUES = {role: value for value, role in _ROLES.items()}


def sampling_to_proto(sampling: SamplingParams) -> llm_pb2.SamplingParams:
    fields = dict(vars(sampling))  # they bear the same names
    fields["logit_bias"] = dict(sampling.logit_bias)
    fields["constraint"] = _constraint_to_proto(sampling.constraint) if sampling.constraint else None
    return llm_pb2.SamplingParams(**fields)


def sampling_from_proto(message: llm_pb2.SamplingParams, field: str = "sampling") -> SamplingParams:
    """Unset fields take the defaults. Raises InvalidInput for a value out of its range."""
    params = SamplingParams(
        **scalars(message),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        logit_bias=tuple((token, shortest(bias)) for token, bias in sorted(message.logit_bias.items())),
        constraint=_constraint_from_proto(message.constraint, field) if message.HasField("constraint") else None,
    )
    check_sampling(params, field)
    return params


def _constraint_to_proto(constraint: Constraint) -> llm_pb2.Constraint:
    if constraint.kind == "choice":
        return llm_pb2.Constraint(choice=llm_pb2.Choices(texts=constraint.choices))
    if constraint.kind == "json_object":
        return llm_pb2.Constraint(json_object=True)
    return llm_pb2.Constraint(**{constraint.kind: constraint.text})  # type: ignore[arg-type]


def _constraint_from_proto(message: llm_pb2.Constraint, field: str) -> Constraint | None:
    """The constraint, or None for a `json_object` that is false, which asks for nothing."""
    kind = message.WhichOneof("kind")
    if kind is None:
        known = ", ".join(field.name for field in message.DESCRIPTOR.oneofs_by_name["kind"].fields)
        raise InvalidInput(f"is empty, expected one of {known}", field=f"{field}.constraint")
    if kind == "json_object":
        return Constraint(kind=kind) if message.json_object else None
    if kind == "choice":
        return Constraint(kind=kind, choices=tuple(message.choice.texts))
    return Constraint(kind=kind, text=getattr(message, kind))


def samplers_to_proto(samplers: SamplerSettings) -> llm_pb2.PruneParams:
    """What the LLM stage is told of them."""
    fields = dict(vars(samplers))  # they bear the same names, but for the switches
    del fields["vision_sampler"]
    return llm_pb2.PruneParams(off=not fields.pop("text_sampler"), **fields)


def samplers_from_proto(
    message: llm_pb2.PruneParams, field: str = "prune", *, vision_sampler: bool = True
) -> SamplerSettings:
    """Raises InvalidInput for a threshold or a ratio outside (0, 1], or both at once."""
    fields = scalars(message)
    off = fields.pop("off", False)
    settings = SamplerSettings(vision_sampler=vision_sampler, text_sampler=not off, **fields)
    check_samplers(settings, field)
    return settings


def turns_to_proto(turns: Sequence[PromptTurn]) -> list[llm_pb2.PromptTurn]:
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
) -> tuple[PromptTurn, ...]:
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
        turns.append(PromptTurn(role=_ROLES[message.role], parts=tuple(parts)))
    return tuple(turns)


def generate_request_to_proto(request: GenerateRequest, model_fingerprint: str) -> llm_pb2.GenerateRequest:
    return llm_pb2.GenerateRequest(
        request_id=request.request_id,
        model_fingerprint=model_fingerprint,
        turns=turns_to_proto(request.turns),
        images=[tokens_to_proto(image) for image in request.images],
        sampling=sampling_to_proto(request.sampling),
        prune=samplers_to_proto(request.samplers),
        continue_final_message=request.continue_final_message,
        raw_prompt=raw_prompt_to_proto(request.raw_prompt),
        return_decision=request.return_decision,
    )


def raw_prompt_to_proto(prompt: str | Sequence[int] | None) -> llm_pb2.RawPrompt | None:
    if prompt is None:
        return None
    if isinstance(prompt, str):
        return llm_pb2.RawPrompt(text=prompt)
    return llm_pb2.RawPrompt(token_ids=llm_pb2.TokenIds(ids=prompt))


def raw_prompt_from_proto(message: llm_pb2.RawPrompt, field: str = "raw_prompt") -> str | tuple[int, ...]:
    """Raises InvalidInput where it is neither text nor at least one token."""
    kind = message.WhichOneof("content")
    if kind is None:
        raise InvalidInput("is neither text nor token_ids", field=field)
    if kind == "text":
        return message.text
    if not message.token_ids.ids:
        raise InvalidInput("is empty, expected at least one token", field=f"{field}.token_ids")
    return tuple(message.token_ids.ids)


def generate_request_from_proto(message: llm_pb2.GenerateRequest, shelf: Shelf | None = None) -> GenerateRequest:
    """A request whose images are in the message or on the shelf.

    Raises InvalidInput naming the field, WrongFingerprint for an image of another checkpoint than the request's, and
    NotOnShelf.
    """
    if not message.request_id:
        raise InvalidInput("is empty", field="request_id")
    check_sha256(message.model_fingerprint, "model_fingerprint")
    images = tuple(tokens_from_proto(image, f"images[{index}]", shelf) for index, image in enumerate(message.images))
    for index, image in enumerate(images):
        if image.model_fingerprint != message.model_fingerprint:
            raise WrongFingerprint(
                f"is {image.model_fingerprint}, the request is for {message.model_fingerprint}",
                field=f"images[{index}].model_fingerprint",
            )
    raw_prompt = raw_prompt_from_proto(message.raw_prompt) if message.HasField("raw_prompt") else None
    if raw_prompt is not None:
        for name in ("turns", "images", "continue_final_message"):
            if getattr(message, name):
                raise InvalidInput("is set beside raw_prompt, expected one of the two", field=name)
    return GenerateRequest(
        request_id=message.request_id,
        turns=turns_from_proto(message.turns, len(images)) if raw_prompt is None else (),
        images=images,
        sampling=sampling_from_proto(message.sampling),
        samplers=samplers_from_proto(message.prune),
        continue_final_message=message.continue_final_message,
        raw_prompt=raw_prompt,
        return_decision=message.return_decision,
    )
