"""Events of the LLM stage <-> protobuf."""

from __future__ import annotations

import torch

from focusllava.v1 import error_pb2, llm_pb2
from services.common.errors import Code, FocusError, InvalidInput
from services.common.types import (
    DecisionEvent,
    FinishedEvent,
    PruneDecision,
    TokenEvent,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)
from services.common.wire.scalars import scalars

_REASONS = {
    llm_pb2.FINISH_REASON_STOP: "stop",
    llm_pb2.FINISH_REASON_LENGTH: "length",
    llm_pb2.FINISH_REASON_ABORT: "abort",
}
_REASON_VALUES = {reason: value for value, reason in _REASONS.items()}

Event = TokenEvent | DecisionEvent | FinishedEvent | FocusError


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
        kv_unpruned_bytes=usage.kv_unpruned_bytes,
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
        kv_unpruned_bytes=message.kv_unpruned_bytes,
        time_to_first_token_s=message.time_to_first_token_ms / 1000,
    )


def event_to_proto(event: Event) -> llm_pb2.GenerateResponse:
    """An event as protobuf; a FocusError becomes the stream's error event."""
    if isinstance(event, TokenEvent):
        token = {"text": event.text, "token_ids": event.token_ids, "prompt_tokens": event.prompt_tokens}
        if event.logprobs:
            token["logprobs"] = [_logprobs_to_proto(logprobs) for logprobs in event.logprobs]
        return llm_pb2.GenerateResponse(token=token)  # a Token of its own would be one more arena to free
    if isinstance(event, FinishedEvent):
        finished = llm_pb2.Finished(reason=_REASON_VALUES[event.reason], usage=usage_to_proto(event.usage))
        return llm_pb2.GenerateResponse(finished=finished)
    if isinstance(event, DecisionEvent):
        return llm_pb2.GenerateResponse(decision=_decision_to_proto(event.decision))
    return llm_pb2.GenerateResponse(error=error_pb2.StreamError(code=event.code.value, message=str(event)))


def event_from_proto(message: llm_pb2.GenerateResponse) -> Event:
    """An event of ours; an error event is returned (not raised) as a FocusError, whose unknown codes are INTERNAL."""
    kind = message.WhichOneof("event")
    if kind == "token":
        token = message.token
        logprobs = tuple(_logprobs_from_proto(logprobs) for logprobs in token.logprobs)
        return TokenEvent(
            text=token.text,
            token_ids=tuple(token.token_ids),
            logprobs=logprobs,
            prompt_tokens=token.prompt_tokens,
        )
    if kind == "finished":
        reason = _REASONS.get(message.finished.reason)
        if reason is None:
            raise InvalidInput(f"is {message.finished.reason}, expected a known reason", field="finished.reason")
        return FinishedEvent(reason=reason, usage=usage_from_proto(message.finished.usage))
    if kind == "decision":
        return DecisionEvent(decision=decision_from_proto(message.decision))
    if kind == "error":
        error = FocusError(message.error.message)
        error.code = Code.__members__.get(message.error.code, Code.INTERNAL)
        return error
    raise InvalidInput("has no event", field="event")


def _decision_to_proto(decision: PruneDecision | None) -> llm_pb2.PruneDecision:
    if decision is None:
        return llm_pb2.PruneDecision()
    return llm_pb2.PruneDecision(
        kept=decision.kept.tolist(),
        importance=decision.importance.tolist(),
        layer=decision.layer,
        threshold=decision.threshold,
        keep_ratio=decision.keep_ratio,
    )


def decision_from_proto(message: llm_pb2.PruneDecision) -> PruneDecision | None:
    """The decision; None where nothing was pruned. Raises InvalidInput for indices that do not ascend."""
    if not message.layer:
        return None
    kept = torch.tensor(message.kept, dtype=torch.int64)
    if bool((kept.diff() < 1).any()):
        raise InvalidInput("does not ascend", field="decision.kept")
    fields = scalars(message)
    return PruneDecision(
        kept=kept,
        importance=torch.tensor(message.importance, dtype=torch.float32),
        layer=message.layer,
        threshold=fields.get("threshold"),
        keep_ratio=fields.get("keep_ratio"),
    )


def _logprobs_to_proto(logprobs: TokenLogprobs) -> llm_pb2.TokenLogprobs:
    def entry(token: TokenLogprob) -> llm_pb2.TokenLogprob:
        return llm_pb2.TokenLogprob(
            token_id=token.token_id, logprob=token.logprob, text=token.text, raw_bytes=token.raw_bytes
        )

    return llm_pb2.TokenLogprobs(chosen=entry(logprobs.chosen), top=[entry(token) for token in logprobs.top])


def _logprobs_from_proto(message: llm_pb2.TokenLogprobs) -> TokenLogprobs:
    def entry(token: llm_pb2.TokenLogprob) -> TokenLogprob:
        return TokenLogprob(token_id=token.token_id, logprob=token.logprob, text=token.text, raw_bytes=token.raw_bytes)

    return TokenLogprobs(chosen=entry(message.chosen), top=tuple(entry(token) for token in message.top))
