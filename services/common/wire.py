"""The only converter between our types and their protobuf messages; everything that comes in is checked here."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np
import torch

from focusllava.v1 import encoder_pb2, error_pb2, llm_pb2, tensor_pb2
from services.common.errors import Code, FocusError, InvalidInput, WrongFingerprint
from services.common.types import (
    ChatTurn,
    CompressedVisualTokens,
    FinishedEvent,
    GenerateRequest,
    ImagePart,
    PruneParams,
    SamplingParams,
    TextPart,
    TokenEvent,
    Usage,
)

assert sys.byteorder == "little", "tensors are little-endian on the wire"

MAX_DIMENSIONS = 8
MAX_STOP_STRINGS = 8
_DTYPES = {
    tensor_pb2.DATA_TYPE_FLOAT32: torch.float32,
    tensor_pb2.DATA_TYPE_FLOAT16: torch.float16,
    tensor_pb2.DATA_TYPE_BFLOAT16: torch.bfloat16,
    tensor_pb2.DATA_TYPE_UINT8: torch.uint8,
}
_DATA_TYPES = {dtype: data_type for data_type, dtype in _DTYPES.items()}
_ROLES = {llm_pb2.ROLE_SYSTEM: "system", llm_pb2.ROLE_USER: "user", llm_pb2.ROLE_ASSISTANT: "assistant"}
_ROLE_VALUES = {role: value for value, role in _ROLES.items()}
_REASONS = {
    llm_pb2.FINISH_REASON_STOP: "stop",
    llm_pb2.FINISH_REASON_LENGTH: "length",
    llm_pb2.FINISH_REASON_ABORT: "abort",
}
_REASON_VALUES = {reason: value for value, reason in _REASONS.items()}

Event = TokenEvent | FinishedEvent | FocusError


def tensor_to_proto(tensor: torch.Tensor) -> tensor_pb2.Tensor:
    """A tensor of 1 to 8 dimensions, none of them 0; float32, float16, bfloat16 or uint8, on any device."""
    assert tensor.dtype in _DATA_TYPES, f"{tensor.dtype} has no type on the wire"
    assert 1 <= tensor.ndim <= MAX_DIMENSIONS and tensor.numel(), f"shape {tuple(tensor.shape)} cannot cross the wire"
    # numpy has no bfloat16: the bytes are read through a view.
    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return tensor_pb2.Tensor(data_type=_DATA_TYPES[tensor.dtype], shape=tensor.shape, data=data)


def tensor_from_proto(message: tensor_pb2.Tensor, field: str = "tensor") -> torch.Tensor:
    """Raises InvalidInput: unknown type, a shape that is not 1 to 8 positive sizes or does not match the bytes, NaN."""
    dtype = _DTYPES.get(message.data_type)
    if dtype is None:
        known = ", ".join(tensor_pb2.DataType.Name(value) for value in _DTYPES)
        raise InvalidInput(f"is {message.data_type}, expected one of {known}", field=f"{field}.data_type")
    shape = tuple(message.shape)
    if not 1 <= len(shape) <= MAX_DIMENSIONS:
        raise InvalidInput(f"has {len(shape)} dimensions, expected 1 to {MAX_DIMENSIONS}", field=f"{field}.shape")
    if any(size < 1 for size in shape):
        raise InvalidInput(f"is {list(shape)}, expected sizes of at least 1", field=f"{field}.shape")
    data = message.data
    expected = math.prod(shape) * dtype.itemsize  # of Python's integers: cannot overflow
    if len(data) != expected:
        found = f"has {len(data)} bytes, expected {expected} for shape {list(shape)} of {dtype}"
        raise InvalidInput(found, field=f"{field}.data")
    # One copy: torch wants memory that may be written, and bytes may not.
    tensor = torch.frombuffer(bytearray(data), dtype=dtype).view(shape)
    # aminmax passes NaN on, and is several times faster than isfinite().all().
    if dtype.is_floating_point and not all(math.isfinite(bound) for bound in tensor.aminmax()):
        raise InvalidInput("holds NaN or infinity", field=f"{field}.data")
    return tensor


def tokens_to_proto(tokens: CompressedVisualTokens) -> encoder_pb2.CompressedVisualTokens:
    return encoder_pb2.CompressedVisualTokens(
        tokens=tensor_to_proto(tokens.tokens_ND),
        branch_ids=tokens.branch_ids_M.cpu().numpy().astype(np.uint8).tobytes(),
        map_height=tokens.map_hw[0],
        map_width=tokens.map_hw[1],
        uncompressed_tokens=tokens.uncompressed_tokens,
        content_hash=tokens.content_hash,
        model_fingerprint=tokens.model_fingerprint,
        notes=tokens.notes,
    )


def tokens_from_proto(
    message: encoder_pb2.CompressedVisualTokens, field: str = "visual_tokens"
) -> CompressedVisualTokens:
    """Raises InvalidInput for a bad tensor, counts that contradict each other, or a hash that is not SHA-256."""
    tokens_ND = tensor_from_proto(message.tokens, f"{field}.tokens")
    if tokens_ND.ndim != 2 or not tokens_ND.is_floating_point():
        raise InvalidInput(
            f"is {tokens_ND.dtype} of shape {list(tokens_ND.shape)}, expected floats of shape [N, D]",
            field=f"{field}.tokens",
        )
    height, width = message.map_height, message.map_width
    if message.uncompressed_tokens < max(1, height * (width + 1)):
        raise InvalidInput(
            f"is {message.uncompressed_tokens}, too few for a map of {height} x {width}",
            field=f"{field}.uncompressed_tokens",
        )
    if len(message.branch_ids) > height * width:
        raise InvalidInput(
            f"names {len(message.branch_ids)} regions in a map of {height} x {width}", field=f"{field}.branch_ids"
        )
    for name in ("content_hash", "model_fingerprint"):
        _check_sha256(getattr(message, name), f"{field}.{name}")
    return CompressedVisualTokens(
        tokens_ND=tokens_ND,
        branch_ids_M=torch.tensor(list(message.branch_ids), dtype=torch.uint8),
        map_hw=(height, width),
        uncompressed_tokens=message.uncompressed_tokens,
        content_hash=message.content_hash,
        model_fingerprint=message.model_fingerprint,
        notes=tuple(message.notes),
    )


def _check_sha256(value: str, field: str) -> None:
    if len(value) != 64 or not set(value) <= set("0123456789abcdef"):
        raise InvalidInput(f"is {value[:80]!r}, expected 64 hexadecimal digits", field=field)


def sampling_to_proto(sampling: SamplingParams) -> llm_pb2.SamplingParams:
    return llm_pb2.SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        stop=sampling.stop,
        ignore_eos=sampling.ignore_eos,
    )


def sampling_from_proto(message: llm_pb2.SamplingParams, field: str = "sampling") -> SamplingParams:
    """Unset fields take the defaults. Raises InvalidInput for a value out of its range."""
    default = SamplingParams()
    max_tokens = message.max_tokens if message.HasField("max_tokens") else default.max_tokens
    temperature = _decimal(message.temperature) if message.HasField("temperature") else default.temperature
    top_p = _decimal(message.top_p) if message.HasField("top_p") else default.top_p
    if max_tokens < 1:
        raise InvalidInput(f"is {max_tokens}, expected at least 1", field=f"{field}.max_tokens")
    if not 0 <= temperature <= 2:
        raise InvalidInput(f"is {temperature}, expected [0, 2]", field=f"{field}.temperature")
    if not 0 < top_p <= 1:
        raise InvalidInput(f"is {top_p}, expected (0, 1]", field=f"{field}.top_p")
    if len(message.stop) > MAX_STOP_STRINGS:
        raise InvalidInput(f"has {len(message.stop)} strings, at most {MAX_STOP_STRINGS}", field=f"{field}.stop")
    for index, stop in enumerate(message.stop):
        if not stop:
            raise InvalidInput("is empty", field=f"{field}.stop[{index}]")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=message.seed if message.HasField("seed") else None,
        stop=tuple(message.stop),
        ignore_eos=message.ignore_eos,
    )


def prune_to_proto(prune: PruneParams) -> llm_pb2.PruneParams:
    return llm_pb2.PruneParams(off=not prune.enabled, threshold=prune.threshold)


def prune_from_proto(message: llm_pb2.PruneParams, field: str = "prune") -> PruneParams:
    """Raises InvalidInput for a threshold outside (0, 1]."""
    threshold = _decimal(message.threshold) if message.HasField("threshold") else None
    if threshold is not None and not 0 < threshold <= 1:
        raise InvalidInput(f"is {threshold}, expected (0, 1]", field=f"{field}.threshold")
    return PruneParams(threshold=threshold, enabled=not message.off)


def _decimal(value: float) -> float:
    """The shortest decimal that is this float32: 0.85 comes out as it went in, not as 0.8500000238."""
    return float(str(np.float32(value)))


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
    _check_sha256(message.model_fingerprint, "model_fingerprint")
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


def usage_to_proto(usage: Usage) -> llm_pb2.Usage:
    return llm_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        visual_tokens_uncompressed=usage.visual_tokens_uncompressed,
        visual_tokens_sampled=usage.visual_tokens_sampled,
        visual_tokens_kept=usage.visual_tokens_kept,
        prune_layer=usage.prune_layer,
        num_layers=usage.num_layers,
        converted_share_percent=100 * usage.converted_share,
        kv_bytes=usage.kv_bytes,
        kv_unpruned_bytes=usage.kv_bytes_unpruned,
        time_to_first_token_ms=1000 * usage.time_to_first_token_s,
    )


def usage_from_proto(message: llm_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        visual_tokens_uncompressed=message.visual_tokens_uncompressed,
        visual_tokens_sampled=message.visual_tokens_sampled,
        visual_tokens_kept=message.visual_tokens_kept,
        prune_layer=message.prune_layer,
        num_layers=message.num_layers,
        kv_bytes=message.kv_bytes,
        kv_bytes_unpruned=message.kv_unpruned_bytes,
        time_to_first_token_s=message.time_to_first_token_ms / 1000,
    )


def event_to_proto(event: Event) -> llm_pb2.GenerateResponse:
    """A FocusError becomes the stream's error event."""
    if isinstance(event, TokenEvent):
        return llm_pb2.GenerateResponse(token=llm_pb2.Token(text=event.text, token_ids=event.token_ids))
    if isinstance(event, FinishedEvent):
        finished = llm_pb2.Finished(reason=_REASON_VALUES[event.reason], usage=usage_to_proto(event.usage))
        return llm_pb2.GenerateResponse(finished=finished)
    return llm_pb2.GenerateResponse(error=error_pb2.StreamError(code=event.code.value, message=str(event)))


def event_from_proto(message: llm_pb2.GenerateResponse) -> Event:
    """An error event comes back (is not raised) as a FocusError with its code; an unknown code is INTERNAL."""
    kind = message.WhichOneof("event")
    if kind == "token":
        return TokenEvent(text=message.token.text, token_ids=tuple(message.token.token_ids))
    if kind == "finished":
        reason = _REASONS.get(message.finished.reason)
        if reason is None:
            raise InvalidInput(f"is {message.finished.reason}, expected a known reason", field="finished.reason")
        return FinishedEvent(reason=reason, usage=usage_from_proto(message.finished.usage))
    if kind == "error":
        error = FocusError(message.error.message)
        error.code = Code.__members__.get(message.error.code, Code.INTERNAL)
        return error
    raise InvalidInput("has no event", field="event")
