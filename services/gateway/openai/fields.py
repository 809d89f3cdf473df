"""Fields of OpenAI's requests: which are known, which change no answer, and how a wrong one is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from services.common.errors import InvalidInput

Accepted = tuple[Any, ...] | None
"""Values of a field that ask for what is done anyway; None where no value of it changes an answer."""

_SHOWN_CHARS = 60
"""Most characters that are shown of a refused value, which may be an image."""

WITHOUT_EFFECT: dict[str, Accepted] = {
    # Fields of OpenAI's.
    "best_of": (1,),
    "echo": (False,),
    "metadata": None,
    "moderation": (),
    "n": (1,),
    "prompt_cache_key": None,
    "prompt_cache_options": None,
    "prompt_cache_retention": None,
    "safety_identifier": None,
    "service_tier": None,
    "store": None,
    "user": None,
    # Fields of vLLM's.
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "cache_salt": (),  # keeps users' caches apart, which is not done
    "early_stopping": (False,),
    "ec_transfer_params": ({},),
    "guided_decoding_backend": None,
    "guided_whitespace_pattern": (),
    "kv_transfer_params": ({},),
    "length_penalty": (1,),
    "logit_processors": ([],),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "priority": (0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "return_mm_kwargs": None,
    "return_token_ids": (False,),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "routed_experts_prompt_start": (0,),
    "session_id": None,
    "spaces_between_special_tokens": None,
    "stream_interval": (1,),
    "thinking_token_budget": (-1,),
    "truncate_prompt_tokens": (),
    "truncation_side": None,
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}
"""Fields of every request for an answer that are accepted and change nothing. null counts as unset everywhere."""


class Wrong(ValueError):
    """What is wrong with a field inside the object that is being checked."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


class Fields(BaseModel):
    """An object of a request. Raises Wrong for a field that is neither its own nor in `without_effect`."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    without_effect: ClassVar[Mapping[str, Accepted]] = {}

    @model_validator(mode="before")
    @classmethod
    def _with_effect(cls, fields: Any) -> Any:
        """Leaves out nulls and what changes no answer. Stops at the first wrong field: there may be thousands."""
        if not isinstance(fields, dict):
            return fields
        effective = {}
        for name, value in fields.items():
            if value is None:
                continue
            if name in cls.without_effect:
                check_without_effect(name, value, cls.without_effect[name])
            elif name in cls.names():
                effective[name] = value
            else:
                raise Wrong(name, "is not supported")
        return effective

    @classmethod
    def names(cls) -> set[str]:
        """Names of the fields that have an effect, as they stand in the request."""
        if "_names" not in cls.__dict__:
            cls._names = {field.alias or name for name, field in cls.model_fields.items()}
        return cls._names

    _names: ClassVar[set[str]]


def check_without_effect(name: str, value: Any, accepted: Accepted) -> None:
    """Raises Wrong for a value that would change the answer."""
    if accepted is None or any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in accepted):
        return
    expected = f"; expected {' or '.join(map(json.dumps, accepted))}" if accepted else ""
    raise Wrong(name, f"is {shown(repr(value))}, which is not supported{expected}")


def field_of(line: str) -> str | None:
    """The field that an error's line begins with."""
    found = re.match(r"([a-zA-Z_][\w-]*(?:\[\d+\])?(?:\.\w+(?:\[\d+\])?)*): ", line)
    return found[1] if found else None


def refuse(error: ValidationError) -> NoReturn:
    """Raises InvalidInput for the first of pydantic's errors: what is wrong, with which field and value."""
    first = error.errors(include_url=False)[0]
    where = _path(first["loc"])
    kind, message, value = first["type"], first["msg"], first.get("input")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, Wrong):
        where, message = f"{where}.{shown(cause.field)}".removeprefix("."), str(cause)
    elif kind == "missing":
        message = "is missing"
    elif kind == "value_error":
        message = str(cause)
    elif kind == "json_invalid":
        where, message = "body", message[0].lower() + message[1:]
    else:
        message = f"is {shown(repr(value))}, " + re.sub(r"^Input should be ", "expected ", message)
    raise InvalidInput(message, field=where or "body")


def shown(value: object) -> str:
    """The beginning of a value's text."""
    text = str(value)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."


def _path(parts: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
