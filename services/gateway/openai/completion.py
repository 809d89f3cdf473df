"""A text completion request as OpenAI's clients and benchmarks send it -> a ChatRequest for each prompt."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

from focusllava.v1 import focus_pb2, llm_pb2
from services.gateway.openai.fields import WITHOUT_EFFECT, shown
from services.gateway.openai.settings import Count, Settings

_MOST_TOKENS = 16
"""Longest answer to a request that names no number, as OpenAI has it for text completions."""
_MOST_PROMPTS = 32
"""Most prompts of one request: each is answered at the same time as the others."""


def _prompts(value: Any) -> Any:
    """A list of prompts, each text or token ids. Raises ValueError for anything else."""
    prompts = value if isinstance(value, list) and value and isinstance(value[0], str | list) else [value]
    if len(prompts) > _MOST_PROMPTS:
        raise ValueError(f"holds {len(prompts)} prompts, expected at most {_MOST_PROMPTS}")
    for prompt in prompts:
        if isinstance(prompt, str):
            continue
        if not isinstance(prompt, list) or not prompt:
            raise ValueError(f"is {shown(repr(value))}, expected text, token ids, or a list of one kind")
        wrong = [one for one in prompt if type(one) is not int or not 0 <= one < 2**32][:1]
        if wrong:
            raise ValueError(f"holds {shown(repr(wrong[0]))}, expected token ids")
    return prompts


class CompletionRequest(Settings):
    """The body of POST /v1/completions."""

    without_effect = {**WITHOUT_EFFECT, "add_special_tokens": (True,), "suffix": ("",)}

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
    logprobs: Count | None = None

    def names_here(self) -> tuple[tuple[str, str], ...]:
        return ((r"^(raw_prompt(\.\w+)?|turns)", "prompt"),)

    @property
    def with_logprobs(self) -> bool:
        return self.logprobs is not None

    def to_chat_requests(self, request_id: str) -> list[focus_pb2.ChatRequest]:
        """A request for each prompt."""
        sampling = self.sampling(_MOST_TOKENS if self.max_tokens is None else self.max_tokens, self.logprobs)
        ids = [request_id] if len(self.prompt) == 1 else [f"{request_id}.{n}" for n in range(len(self.prompt))]
        return [
            focus_pb2.ChatRequest(raw_prompt=_raw(prompt), sampling=sampling, request_id=one)
            for prompt, one in zip(self.prompt, ids, strict=True)
        ]


def _raw(prompt: str | list[int]) -> llm_pb2.RawPrompt:
    if isinstance(prompt, str):
        return llm_pb2.RawPrompt(text=prompt)
    return llm_pb2.RawPrompt(token_ids=llm_pb2.TokenIds(ids=prompt))
