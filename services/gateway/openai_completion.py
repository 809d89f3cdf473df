"""A text completion request as OpenAI's clients and benchmarks send it -> ChatRequest."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

from focusllava.v1 import focus_pb2, llm_pb2
from services.gateway.openai_fields import WITHOUT_EFFECT, shown
from services.gateway.openai_settings import Count, Settings

_MOST_TOKENS = 16
"""Of an answer to a request that names no number, as OpenAI has it here."""


def _one_prompt(value: Any) -> Any:
    """Text or token ids, out of a list that holds them alone. Raises ValueError for anything else."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        (value,) = value
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(one) is int for one in value)):
        wrong = next((one for one in value if not 0 <= one < 2**32), None) if isinstance(value, list) else None
        if wrong is not None:
            raise ValueError(f"holds {wrong}, expected token ids")
        return value
    if isinstance(value, list) and len(value) > 1 and all(isinstance(one, str | list) for one in value):
        raise ValueError(f"holds {len(value)} prompts, expected one; send a request for each")
    raise ValueError(f"is {shown(repr(value))}, expected text or token ids")


class CompletionRequest(Settings):
    """The body of POST /v1/completions."""

    without_effect = {**WITHOUT_EFFECT, "add_special_tokens": (True,), "suffix": ("",)}

    prompt: Annotated[str | list[int], BeforeValidator(_one_prompt)]
    logprobs: Count | None = None

    def names_here(self) -> tuple[tuple[str, str], ...]:
        return ((r"^(raw_prompt(\.\w+)?|turns)", "prompt"),)

    @property
    def with_logprobs(self) -> bool:
        return self.logprobs is not None

    def to_chat_request(self, request_id: str) -> focus_pb2.ChatRequest:
        """The same request as the gRPC API takes it."""
        if isinstance(self.prompt, str):
            prompt = llm_pb2.RawPrompt(text=self.prompt)
        else:
            prompt = llm_pb2.RawPrompt(token_ids=llm_pb2.TokenIds(ids=self.prompt))
        max_tokens = _MOST_TOKENS if self.max_tokens is None else self.max_tokens
        return focus_pb2.ChatRequest(
            raw_prompt=prompt, sampling=self.sampling(max_tokens, self.logprobs), request_id=request_id
        )
