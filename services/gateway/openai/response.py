"""Events of an answer -> OpenAI's chat completion or text completion, whole or in chunks."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from focusllava.v1 import focus_pb2, llm_pb2
from services.gateway.openai.focus_maps import maps_object
from services.gateway.openai.settings import Asked

_REASONS = {llm_pb2.FINISH_REASON_STOP: "stop", llm_pb2.FINISH_REASON_LENGTH: "length"}
_LEAST_LOGPROB = -9999.0
"""OpenAI's number for minus infinity, which JSON has none for."""


@dataclass(kw_only=True)
class Collected:
    """A whole answer, collected from its events."""

    writer: Writer
    tokens: list[llm_pb2.Token] = field(default_factory=list)
    finished: llm_pb2.Finished = field(default_factory=llm_pb2.Finished)
    maps: focus_pb2.FocusMaps | None = None
    """None for who did not ask."""


def whole(answers: Sequence[Collected]) -> dict[str, Any]:
    """Every answer to one request in one object, a choice each."""
    first, finished = answers[0], [answer.finished for answer in answers]
    return {
        **first.writer.object(first.writer.kind),
        "choices": [answer.writer.choice(answer.tokens, answer.finished) for answer in answers],
        "usage": _total(finished),
        "focus": {**first.writer.focus(first.finished.usage), **(maps_object(first.maps) if first.maps else {})},
    }


class Writer(abc.ABC):
    """Writes one answer, whose `started` event it is made with. A subclass writes one of OpenAI's kinds of objects."""

    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    id_prefix: ClassVar[str]

    def __init__(self, model: str, asked: Asked, started: focus_pb2.ChatStarted, index: int):
        self._model, self._asked, self._started, self._index = model, asked, started, index
        self._completion_tokens = 0

    def choice(self, tokens: Sequence[llm_pb2.Token], finished: llm_pb2.Finished) -> dict[str, Any]:
        """The answer as a choice of a whole object."""
        text = "".join(token.text for token in tokens)
        entries = [entry for token in tokens for entry in token.logprobs]
        logprobs = self._logprobs(entries) if self._asked.logprobs else None
        return self._choice(text, logprobs, _reason(finished))

    def first_chunk(self) -> dict[str, Any] | None:
        """What comes before the first token."""
        return None

    def chunk(self, token: llm_pb2.Token) -> dict[str, Any] | None:
        """New text; None where the token says nothing yet."""
        self._completion_tokens += len(token.token_ids)
        if not (token.text or token.logprobs):
            return None
        return self._chunk(self._part(token.text, self._logprobs(token.logprobs) if token.logprobs else None, None))

    def last_chunk(self, finished: llm_pb2.Finished) -> dict[str, Any]:
        """The reason of the end, and the accounting."""
        return {**self._chunk(self._part("", None, _reason(finished))), "focus": self.focus(finished.usage)}

    def maps_chunk(self, maps: focus_pb2.FocusMaps) -> dict[str, Any]:
        """What the samplers chose, with no new text."""
        return {**self._chunk(self._part("", None, None)), "focus": maps_object(maps)}

    def usage_chunk(self, finished: Sequence[llm_pb2.Finished]) -> dict[str, Any]:
        """The chunk with the usage, sent last to who asked for it; `finished` are the ends of all answers."""
        return {**self.object(self.chunk_kind), "choices": [], "usage": _total(finished)}

    @abc.abstractmethod
    def _choice(self, text: str, logprobs: Any, reason: str) -> dict[str, Any]:
        """The one choice of a whole answer."""

    @abc.abstractmethod
    def _part(self, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        """The one choice of a chunk."""

    @abc.abstractmethod
    def _logprobs(self, tokens: Sequence[llm_pb2.TokenLogprobs]) -> dict[str, Any]:
        """The log probabilities of a choice."""

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self.object(self.chunk_kind), "choices": [choice]}
        if self._asked.continuous_usage:
            chunk["usage"] = _usage(self._started.prompt_tokens, self._completion_tokens)
        elif self._asked.usage:
            chunk["usage"] = None
        return chunk

    def object(self, kind: str) -> dict[str, Any]:
        """What every object of the answer begins with."""
        asked = self._asked
        return {"id": self.id_prefix + asked.request_id, "object": kind, "created": asked.created, "model": self._model}

    def focus(self, usage: llm_pb2.Usage) -> dict[str, Any]:
        """The accounting that OpenAI has no field for; names and units as in Usage and ImageInfo of the gRPC API."""
        return {
            "images": [
                {
                    "content_hash": image.content_hash,
                    "cached": image.cached,
                    "visual_tokens_uncompressed": image.visual_tokens_uncompressed,
                    "visual_tokens_sampled": image.visual_tokens_sampled,
                    "notes": list(image.notes),
                }
                for image in self._started.images
            ],
            "visual_tokens_uncompressed": usage.visual_tokens_uncompressed,
            "visual_tokens_sampled": usage.visual_tokens_sampled,
            "visual_tokens_kept": usage.visual_tokens_kept,
            "prune_layer": usage.prune_layer,
            "num_layers": usage.num_layers,
            "converted_share_percent": round(usage.converted_share_percent, 2),
            "kv_bytes": usage.kv_bytes,
            "kv_unpruned_bytes": usage.kv_unpruned_bytes,
            "time_to_first_token_ms": round(usage.time_to_first_token_ms, 2),
            "compression_level": usage.compression_level,
            "load_map_share": round(usage.load_map_share, 4),
            "load_threshold": round(usage.load_threshold, 4),
        }


class ChatWriter(Writer):
    """Writes what /v1/chat/completions answers."""

    kind, chunk_kind, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def first_chunk(self) -> dict[str, Any]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._chunk({"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None})

    def _choice(self, text: str, logprobs: Any, reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": self._index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _part(self, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        delta = {} if reason else {"content": text}
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: Sequence[llm_pb2.TokenLogprobs]) -> dict[str, Any]:
        content = [{**_logprob(token.chosen), "top_logprobs": [_logprob(one) for one in token.top]} for token in tokens]
        return {"content": content, "refusal": None}


class TextWriter(Writer):
    """Writes what /v1/completions answers."""

    kind, chunk_kind, id_prefix = "text_completion", "text_completion", "cmpl-"

    def __init__(self, model: str, asked: Asked, started: focus_pb2.ChatStarted, index: int):
        super().__init__(model, asked, started, index)
        self._offset = 0  # characters of the tokens so far

    def _choice(self, text: str, logprobs: Any, reason: str) -> dict[str, Any]:
        return self._part(text, logprobs, reason)

    def _part(self, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: Sequence[llm_pb2.TokenLogprobs]) -> dict[str, Any]:
        """Lists with one entry a token; a token's alternatives have itself among them."""
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token.chosen.text)
        return {
            "tokens": [token.chosen.text for token in tokens],
            "token_logprobs": [_finite(token.chosen.logprob) for token in tokens],
            "top_logprobs": [
                {one.text: _finite(one.logprob) for one in (*token.top, token.chosen)} for token in tokens
            ],
            "text_offset": offsets,
        }


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _total(finished: Sequence[llm_pb2.Finished]) -> dict[str, int]:
    return _usage(
        sum(one.usage.prompt_tokens for one in finished), sum(one.usage.completion_tokens for one in finished)
    )


def _reason(finished: llm_pb2.Finished) -> str:
    return _REASONS.get(finished.reason, "abort")


def _logprob(one: llm_pb2.TokenLogprob) -> dict[str, Any]:
    return {"token": one.text, "logprob": _finite(one.logprob), "bytes": list(one.raw_bytes)}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
