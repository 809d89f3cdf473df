"""The range of every setting that a request may bring; the gateway, the wire and the engine all check here."""

from __future__ import annotations

from services.common.errors import InvalidInput
from services.common.types import Constraint, PruneParams, SamplingParams

MAX_TEMPERATURE = 2.0
MAX_REPETITION_PENALTY = 2.0
MAX_PENALTY = 2.0
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 8
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 100.0
MAX_BIASED_TOKENS = 1024
MAX_CONSTRAINT_CHARS = 65_536
"""Longest text of a constraint, or all its choices together."""


def check_sampling(params: SamplingParams, field: str = "sampling") -> None:
    """Raises InvalidInput naming the first field out of range, its value and the range."""

    def check(right: bool, name: str, expected: str) -> None:
        if not right:
            raise InvalidInput(f"is {getattr(params, name)}, expected {expected}", field=f"{field}.{name}")

    # Each comparison is false for NaN.
    check(params.max_tokens >= 1, "max_tokens", "1 or more")
    check(0 <= params.min_tokens <= params.max_tokens, "min_tokens", f"0 to max_tokens, which is {params.max_tokens}")
    check(0 <= params.temperature <= MAX_TEMPERATURE, "temperature", f"[0, {MAX_TEMPERATURE:g}]")
    check(params.top_k >= 0, "top_k", "0 or more")
    check(0 < params.top_p <= 1, "top_p", "(0, 1]")
    check(0 <= params.min_p <= 1, "min_p", "[0, 1]")
    check(
        0 < params.repetition_penalty <= MAX_REPETITION_PENALTY,
        "repetition_penalty",
        f"(0, {MAX_REPETITION_PENALTY:g}]",
    )
    for name in ("presence_penalty", "frequency_penalty"):
        check(abs(getattr(params, name)) <= MAX_PENALTY, name, f"[-{MAX_PENALTY:g}, {MAX_PENALTY:g}]")
    check(params.seed is None or 0 <= params.seed < 2**64, "seed", "[0, 2^64)")
    check(params.logprobs is None or 0 <= params.logprobs <= MAX_LOGPROBS, "logprobs", f"0 to {MAX_LOGPROBS}")
    if len(params.stop) > MAX_STOP_STRINGS:
        raise InvalidInput(
            f"has {len(params.stop)} strings, expected at most {MAX_STOP_STRINGS}", field=f"{field}.stop"
        )
    for index, stop in enumerate(params.stop):
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            found = f"has {len(stop)} characters, expected at most {MAX_STOP_CHARS}" if stop else "is empty"
            raise InvalidInput(found, field=f"{field}.stop[{index}]")
    if len(params.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidInput(
            f"has {len(params.stop_token_ids)} ids, expected at most {MAX_STOP_TOKEN_IDS}",
            field=f"{field}.stop_token_ids",
        )
    if len(params.logit_bias) > MAX_BIASED_TOKENS:
        raise InvalidInput(
            f"has {len(params.logit_bias)} tokens, expected at most {MAX_BIASED_TOKENS}", field=f"{field}.logit_bias"
        )
    for token_id, bias in params.logit_bias:
        if not abs(bias) <= MAX_LOGIT_BIAS:
            raise InvalidInput(
                f"is {bias}, expected [-{MAX_LOGIT_BIAS:g}, {MAX_LOGIT_BIAS:g}]",
                field=f"{field}.logit_bias[{token_id}]",
            )
    if params.constraint is not None:
        _check_constraint(params.constraint, f"{field}.constraint.{params.constraint.kind}")


def _check_constraint(constraint: Constraint, field: str) -> None:
    if constraint.kind == "choice":
        if not constraint.choices:
            raise InvalidInput("is empty, expected at least one text", field=field)
        for index, choice in enumerate(constraint.choices):
            if not choice:
                raise InvalidInput("is empty", field=f"{field}[{index}]")
    elif constraint.kind != "json_object" and not constraint.text:
        raise InvalidInput("is empty", field=field)
    chars = len(constraint.text) + sum(map(len, constraint.choices))
    if chars > MAX_CONSTRAINT_CHARS:
        raise InvalidInput(f"has {chars} characters, expected at most {MAX_CONSTRAINT_CHARS}", field=field)


def check_prune(params: PruneParams, field: str = "prune") -> None:
    """Raises InvalidInput: threshold or keep_ratio outside (0, 1], or both of them set."""
    for name in ("threshold", "keep_ratio"):
        value = getattr(params, name)
        if value is not None and not 0 < value <= 1:
            raise InvalidInput(f"is {value}, expected (0, 1]", field=f"{field}.{name}")
    if params.threshold is not None and params.keep_ratio is not None:
        raise InvalidInput(
            f"is {params.keep_ratio} beside a threshold of {params.threshold}, expected one of the two",
            field=f"{field}.keep_ratio",
        )
