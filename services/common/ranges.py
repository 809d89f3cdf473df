"""Whether a request's settings are in range; the gateway, the wire and the engine all check here.

A number's range stands beside its default in `services/common/types.py`.
"""

from __future__ import annotations

from services.common.errors import InvalidInput
from services.common.settings import check_settings
from services.common.types import Constraint, ImageOptions, SamplerSettings, SamplingParams

MAX_STOP_STRINGS = 8
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 100.0
MAX_BIASED_TOKENS = 1024
MAX_CONSTRAINT_CHARS = 65_536
"""Longest text of a constraint, or all its choices together."""


def check_sampling(params: SamplingParams, field: str = "sampling") -> None:
    """Raises InvalidInput naming the first field out of range, its value and the range."""

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
    check_settings(params, f"{field}.")
    if params.min_tokens > params.max_tokens:
        found = f"is {params.min_tokens}, expected 0 to max_tokens, which is {params.max_tokens}"
        raise InvalidInput(found, field=f"{field}.min_tokens")
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


def check_map_share(options: ImageOptions, vision_sampler: bool, field: str) -> None:
    """Raises InvalidInput where a share is asked of a vision-guided sampler that is off."""
    if options.map_share is not None and not vision_sampler:
        found = f"is {options.map_share} with the vision-guided sampler off, expected one of the two"
        raise InvalidInput(found, field=f"{field}.map_share")


def check_samplers(settings: SamplerSettings, field: str = "prune") -> None:
    """Raises InvalidInput: threshold or keep_ratio out of range, or both of them set."""
    check_settings(settings, f"{field}.")
    if settings.threshold is not None and settings.keep_ratio is not None:
        raise InvalidInput(
            f"is {settings.keep_ratio} beside a threshold of {settings.threshold}, expected one of the two",
            field=f"{field}.keep_ratio",
        )
