"""The next token of every running sequence: greedy, temperature, top-p, each with a seed of its own.

Legend: n sequences, V vocabulary.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch

from services.common.errors import InvalidInput
from services.common.types import SamplingParams

MAX_STOP_STRINGS = 8
MAX_TEMPERATURE = 2.0


def check_sampling(params: SamplingParams) -> None:
    """Raises InvalidInput naming the first field out of range."""
    if params.max_tokens < 1:
        raise InvalidInput(f"is {params.max_tokens}, expected 1 or more", field="sampling.max_tokens")
    if not 0 <= params.temperature <= MAX_TEMPERATURE:  # false for NaN too
        raise InvalidInput(f"is {params.temperature}, expected [0, {MAX_TEMPERATURE}]", field="sampling.temperature")
    if not 0 < params.top_p <= 1:
        raise InvalidInput(f"is {params.top_p}, expected (0, 1]", field="sampling.top_p")
    if params.seed is not None and not 0 <= params.seed < 2**64:
        raise InvalidInput(f"is {params.seed}, expected [0, 2^64)", field="sampling.seed")
    if len(params.stop) > MAX_STOP_STRINGS:
        raise InvalidInput(f"has {len(params.stop)} strings, at most {MAX_STOP_STRINGS}", field="sampling.stop")
    if not all(params.stop):
        raise InvalidInput("has an empty string", field="sampling.stop")


def new_generator(params: SamplingParams) -> torch.Generator:
    """The request's own source of randomness, so that its draws do not depend on the batch it runs in."""
    return torch.Generator().manual_seed(secrets.randbits(63) if params.seed is None else params.seed)


def sample(
    logits_nV: torch.Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator]
) -> list[int]:
    """One token id a row. temperature 0 is greedy; top_p keeps the likeliest tokens whose mass reaches it.

    Every draw takes exactly one uniform number from its row's generator.
    """
    drawn = [index for index, p in enumerate(params) if p.temperature > 0]
    tokens = logits_nV.argmax(dim=-1)
    if drawn:
        rows = torch.tensor(drawn, device=logits_nV.device)

        def column(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=logits_nV.device)[:, None]

        temperature = column([params[i].temperature for i in drawn])
        top_p = column([params[i].top_p for i in drawn])
        uniform = column([torch.rand((), generator=generators[i]).item() for i in drawn])
        # The largest logit is moved to 0 first: a tiny temperature then cannot overflow to inf - inf.
        logits = logits_nV[rows].float()
        probability, order = (
            ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1).sort(descending=True, stable=True)
        )
        cumulative = probability.cumsum(-1)
        # The token that crosses top_p is kept; the draw is over the kept mass. (A row of NaN must not fail its batch.)
        kept = (cumulative - probability < top_p).sum(-1, keepdim=True).clamp(min=1)
        mass = cumulative.gather(1, kept - 1)
        chosen = torch.searchsorted(cumulative, uniform * mass, right=True).minimum(kept - 1)
        tokens[rows] = order.gather(1, chosen).squeeze(1)
    return tokens.tolist()
