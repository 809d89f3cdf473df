"""Events of an answer -> OpenAI's chat completion, whole or in chunks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from focusllava.v1 import focus_pb2, llm_pb2

_REASONS = {llm_pb2.FINISH_REASON_STOP: "stop", llm_pb2.FINISH_REASON_LENGTH: "length"}


class CompletionWriter:
    """Writes one answer; its `started` event comes with it."""

    def __init__(self, model: str, started: focus_pb2.ChatStarted):
        self._model, self._started, self._created = model, started, int(time.time())

    def whole(self, tokens: Sequence[llm_pb2.Token], finished: llm_pb2.Finished, *, logprobs: bool) -> dict[str, Any]:
        """An object "chat.completion"."""
        message = {"role": "assistant", "content": "".join(token.text for token in tokens), "refusal": None}
        content = [entry for token in tokens for entry in token.logprobs]
        choice = {
            "index": 0,
            "message": message,
            "logprobs": {"content": _logprobs(content), "refusal": None} if logprobs else None,
            "finish_reason": _reason(finished),
        }
        return {
            **self._object("chat.completion"),
            "choices": [choice],
            "usage": _usage(finished.usage),
            "focus": self._focus(finished.usage),
        }

    def first_chunk(self) -> dict[str, Any]:
        return self._chunk({"role": "assistant", "content": "", "refusal": None})

    def chunk(self, token: llm_pb2.Token) -> dict[str, Any]:
        return self._chunk({"content": token.text}, logprobs=token.logprobs)

    def last_chunk(self, finished: llm_pb2.Finished) -> dict[str, Any]:
        return {**self._chunk({}, reason=_reason(finished)), "focus": self._focus(finished.usage)}

    def usage_chunk(self, finished: llm_pb2.Finished) -> dict[str, Any]:
        """Sent after the last one to who asked for it."""
        return {**self._object("chat.completion.chunk"), "choices": [], "usage": _usage(finished.usage)}

    def _chunk(self, delta: dict[str, Any], *, logprobs: Sequence[llm_pb2.TokenLogprobs] = (),
               reason: str | None = None) -> dict[str, Any]:  # fmt: skip
        content = {"content": _logprobs(logprobs), "refusal": None} if logprobs else None
        choice = {"index": 0, "delta": delta, "logprobs": content, "finish_reason": reason}
        return {**self._object("chat.completion.chunk"), "choices": [choice]}

    def _object(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self._started.request_id}",
            "object": kind,
            "created": self._created,
            "model": self._model,
        }

    def _focus(self, usage: llm_pb2.Usage) -> dict[str, Any]:
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
        }


def _usage(usage: llm_pb2.Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _reason(finished: llm_pb2.Finished) -> str:
    return _REASONS.get(finished.reason, "abort")


def _logprobs(tokens: Sequence[llm_pb2.TokenLogprobs]) -> list[dict[str, Any]]:
    return [{**_logprob(token.chosen), "top_logprobs": [_logprob(one) for one in token.top]} for token in tokens]


def _logprob(one: llm_pb2.TokenLogprob) -> dict[str, Any]:
    partial = "\N{REPLACEMENT CHARACTER}" in one.text  # a part of a character: its bytes are not known here
    return {"token": one.text, "logprob": one.logprob, "bytes": None if partial else list(one.text.encode())}
