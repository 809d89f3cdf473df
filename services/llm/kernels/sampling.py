"""The next token of every running sequence, each drawn by its own request's settings and seed.

A row goes through these in transformers' order: logit_bias, repetition penalty, frequency and presence penalty, what
the constraint and min_tokens leave, temperature, top_k, top_p, min_p. (vLLM differs in min_p alone, which it takes
before top_k.) Repetition counts prompt and answer, the other two penalties the answer alone, as in vLLM and the OpenAI
API. Log probabilities are the model's, before all of this.

Legend: n sequences, m of them with some feature, V vocabulary, C candidates, K tokens of prompts and answers, W words.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from services.common.types import MAX_LOGPROBS, SampledToken, SamplingParams, TokenLogprob, TokenLogprobs

CANDIDATES = 256
"""Likeliest tokens that are looked at before a row's whole vocabulary is sorted, which takes 20 times as long."""


def new_generator(params: SamplingParams) -> torch.Generator:
    """The request's own source of randomness, so that its draws do not depend on the batch it runs in."""
    return torch.Generator().manual_seed(secrets.randbits(63) if params.seed is None else params.seed)


def sample(
    logits_nV: torch.Tensor,
    params: Sequence[SamplingParams],
    generators: Sequence[torch.Generator],
    prompt_ids: Sequence[Sequence[int]],
    output_ids: Sequence[Sequence[int]],
    *,
    guided: Sequence[int] = (),
    masks_mW: npt.NDArray[np.uint32] | None = None,
    forbidden: Sequence[Sequence[int]] | None = None,
) -> list[SampledToken]:
    """One token a row of float logits [n, V], which are left as they are.

    guided: rows, in order, that may draw the tokens of masks_mW alone: uint32 [m, W], 32 * W >= V, bit t % 32 of word
    t // 32 for token t. forbidden: ids that a row may not draw; None where no row has any.

    prompt_ids and output_ids are read for rows with penalties only; ids outside the vocabulary (image placeholders)
    count for nothing. A row with a temperature takes exactly one uniform number from its generator, a greedy row none,
    and nothing of a row's outcome depends on the other rows.
    """
    forbidden = forbidden or [()] * len(params)
    follows = set(guided)
    changed = [
        row
        for row, p in enumerate(params)
        if p.temperature > 0 or _has_penalty(p) or p.logit_bias or row in follows or forbidden[row]
    ]
    tokens_n = logits_nV.argmax(dim=-1)
    if changed:
        rows_m = torch.tensor(changed, device=logits_nV.device)
        scores_mV = logits_nV[rows_m].float()
        changed_params = [params[index] for index in changed]
        _shift(scores_mV, [p.logit_bias for p in changed_params])
        _penalise(scores_mV, changed_params, [prompt_ids[i] for i in changed], [output_ids[i] for i in changed])
        if masks_mW is not None:
            _allow(scores_mV, [place for place, row in enumerate(changed) if row in follows], masks_mW)
        _shift(scores_mV, [[(token, -math.inf) for token in forbidden[i]] for i in changed])
        tokens_m = scores_mV.argmax(dim=-1)
        drawn = [index for index, p in enumerate(changed_params) if p.temperature > 0]
        if drawn:
            uniforms = [torch.rand((), generator=generators[changed[i]], dtype=torch.float64).item() for i in drawn]
            _draw(scores_mV, drawn, [changed_params[i] for i in drawn], uniforms, tokens_m)
        tokens_n[rows_m] = tokens_m
    tokens = tokens_n.tolist()
    logprobs = _logprobs(logits_nV, params, tokens)
    return [SampledToken(token_id=token, logprob=logprobs.get(row)) for row, token in enumerate(tokens)]


def _has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or bool(params.presence_penalty or params.frequency_penalty)


def _allow(scores_mV: torch.Tensor, rows: Sequence[int], masks_rW: npt.NDArray[np.uint32]) -> None:
    """Leaves in these rows the tokens of their masks alone, in place; one copy to the device for all of them."""
    refused_rB, vocabulary = (~masks_rW).view(np.uint8), scores_mV.shape[1]
    if scores_mV.device.type == "cpu":
        refused_rV = torch.from_numpy(np.unpackbits(refused_rB, 1, vocabulary, "little").view(np.bool_))
    else:  # an eighth of it is copied
        bit_8 = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=scores_mV.device)
        refused_rV = ((torch.from_numpy(refused_rB).to(scores_mV.device)[:, :, None] & bit_8) != 0).flatten(1)[
            :, :vocabulary
        ]
    if len(rows) == len(scores_mV):
        scores_mV.masked_fill_(refused_rV, -math.inf)
    else:
        rows_r = torch.tensor(rows, device=scores_mV.device)
        scores_mV[rows_r] = scores_mV[rows_r].masked_fill(refused_rV, -math.inf)


def _shift(scores_mV: torch.Tensor, shifts: Sequence[Sequence[tuple[int, float]]]) -> None:
    """Adds to each row's scores by token id, in place. A row names a token once."""
    flat = [(row * scores_mV.shape[1] + token, by) for row, shift in enumerate(shifts) for token, by in shift]
    if flat:
        flat_K = torch.tensor([index for index, _ in flat], device=scores_mV.device)
        scores_mV.view(-1)[flat_K] += torch.tensor([by for _, by in flat], device=scores_mV.device)


def _penalise(
    scores_mV: torch.Tensor,
    params: Sequence[SamplingParams],
    prompt_ids: Sequence[Sequence[int]],
    output_ids: Sequence[Sequence[int]],
) -> None:
    """Changes the logits of tokens seen, in place."""
    rows = [row for row, p in enumerate(params) if _has_penalty(p)]
    if not rows:
        return
    vocabulary, device = scores_mV.shape[1], scores_mV.device
    flat_scores = scores_mV.view(-1)

    def flat_ids(sequences: list[Sequence[int]]) -> torch.Tensor:
        """Places of the ids of row rows[i] in the flat scores (on the CPU); ids may repeat."""
        ids_K = torch.tensor([token for ids in sequences for token in ids], dtype=torch.int64)
        row_K = torch.tensor(rows).repeat_interleave(torch.tensor([len(ids) for ids in sequences]))
        inside = (ids_K >= 0) & (ids_K < vocabulary)
        return (row_K * vocabulary + ids_K)[inside]

    def per_token(name: str, flat_K: torch.Tensor) -> torch.Tensor:
        values_m = torch.tensor([getattr(p, name) for p in params], dtype=torch.float32)
        return values_m[flat_K // vocabulary].to(device)

    answers_K = flat_ids([output_ids[row] for row in rows])
    prompts_K = flat_ids([prompt_ids[row] if params[row].repetition_penalty != 1 else () for row in rows])
    # A token met twice is read and written twice with the same value.
    seen_K = torch.cat([answers_K, prompts_K])
    repetition_K, seen_K = per_token("repetition_penalty", seen_K), seen_K.to(device)
    score_K = flat_scores[seen_K]
    # A penalty near 0 overflows, and a difference of infinities is no number: every token then has probability NaN.
    most = torch.finfo(score_K.dtype).max
    repeated_K = torch.where(score_K > 0, score_K / repetition_K, score_K * repetition_K)
    flat_scores[seen_K] = repeated_K.clamp(-most, most)

    answers_K, count_K = answers_K.unique(return_counts=True)
    penalty_K = per_token("frequency_penalty", answers_K) * count_K.to(device) + per_token(
        "presence_penalty", answers_K
    )
    flat_scores[answers_K.to(device)] -= penalty_K


def _draw(
    scores_mV: torch.Tensor,
    drawn: list[int],
    params: Sequence[SamplingParams],
    uniforms: list[float],
    tokens_m: torch.Tensor,
) -> None:
    """Draws for the rows `drawn`, whose params and uniform numbers are given, into tokens_m."""
    limited = [i for i, p in enumerate(params) if p.top_k or p.top_p < 1 or p.min_p]
    free = [i for i, p in enumerate(params) if not (p.top_k or p.top_p < 1 or p.min_p)]
    for some, limits in ((free, False), (limited, True)):
        if not some:
            continue
        rows = torch.tensor([drawn[i] for i in some], device=scores_mV.device)
        temperature = _column([params[i].temperature for i in some], scores_mV.device)
        scores = scores_mV[rows]
        # The largest logit is moved to 0 first: a tiny temperature then cannot overflow to inf - inf.
        probability = ((scores - scores.amax(-1, keepdim=True)) / temperature.float().clamp(min=1e-30)).softmax(-1)
        uniform = _column([uniforms[i] for i in some], scores_mV.device)
        if limits:
            tokens_m[rows] = _draw_limited(probability, [params[i] for i in some], uniform, CANDIDATES)
        else:
            cumulative = probability.cumsum(-1, dtype=torch.float64)
            tokens_m[rows] = _pick(cumulative, cumulative[:, -1:], uniform)


def _column(values: Sequence[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)[:, None]


def _pick(cumulative: torch.Tensor, mass: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first place of each row [m] whose cumulative probability exceeds uniform * mass."""
    # Below the mass even where the product rounds up to it: a token of probability 0 is never chosen.
    target = torch.minimum(uniform * mass, mass.nextafter(torch.zeros_like(mass)))
    # A row of NaN must not fail its batch.
    return torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[1] - 1).squeeze(1)


def _draw_limited(
    probability_mV: torch.Tensor, params: Sequence[SamplingParams], uniform: torch.Tensor, candidates: int
) -> torch.Tensor:
    """Draws where top_k, top_p or min_p apply: each keeps the beginning of the tokens ordered by probability.

    Equal tokens stand in order of their ids. Rows whose kept tokens are not sure to lie among the `candidates`
    likeliest are done again with the whole vocabulary.
    """
    vocabulary, device = probability_mV.shape[1], probability_mV.device
    whole = 4 * candidates >= vocabulary
    if whole:
        value_mC, id_mC = probability_mV.sort(descending=True, stable=True)
    else:
        # topk leaves equals in any order.
        id_mC = probability_mV.topk(candidates, dim=-1, sorted=False).indices.sort(-1).values
        value_mC, order = probability_mV.gather(1, id_mC).sort(descending=True, stable=True)
        id_mC = id_mC.gather(1, order)
    width = value_mC.shape[1]
    cumulative = value_mC.cumsum(-1, dtype=torch.float64)

    top_k = torch.tensor([min(p.top_k or vocabulary, vocabulary) for p in params], device=device)[:, None]
    # top_p is a share of what top_k left; with no top_k that is 1.
    left = cumulative.gather(1, top_k.clamp(max=width) - 1).where(top_k < vocabulary, 1.0)
    nucleus = _column([p.top_p if p.top_p < 1 else torch.inf for p in params], device) * left
    floor = _column([p.min_p for p in params], device) * value_mC[:, :1].double()
    # The token that crosses top_p is kept.
    kept = ((cumulative - value_mC < nucleus) & (value_mC >= floor)).sum(-1, keepdim=True).minimum(top_k).clamp(min=1)
    tokens = id_mC.gather(1, _pick(cumulative, cumulative.gather(1, kept - 1), uniform)[:, None]).squeeze(1)
    if whole:
        return tokens
    # Those above the last candidate are in place; of its equals some may be missing.
    sure = (value_mC > value_mC[:, -1:]).sum(-1, keepdim=True)
    again = ((kept > sure) | ((top_k > width) & (top_k < vocabulary))).squeeze(1).nonzero().squeeze(1)
    if len(again):
        some = [params[i] for i in again.tolist()]
        tokens[again] = _draw_limited(probability_mV[again], some, uniform[again], vocabulary)
    return tokens


def _logprobs(
    logits_nV: torch.Tensor, params: Sequence[SamplingParams], tokens: Sequence[int]
) -> dict[int, TokenLogprobs]:
    """Log probabilities by row, for those rows that asked."""
    rows = [index for index, p in enumerate(params) if p.logprobs is not None]
    if not rows:
        return {}
    logprob_mV = logits_nV[torch.tensor(rows, device=logits_nV.device)].float().log_softmax(-1)
    chosen_m = logprob_mV.gather(1, torch.tensor([[tokens[row]] for row in rows], device=logits_nV.device)).squeeze(1)
    # Always as many as anyone may ask for: which of equals come out must not depend on what others asked.
    ids = logprob_mV.topk(min(MAX_LOGPROBS, logprob_mV.shape[1]), dim=-1).indices.sort(-1).values
    values, order = logprob_mV.gather(1, ids).sort(descending=True, stable=True)
    found = zip(rows, chosen_m.tolist(), ids.gather(1, order).tolist(), values.tolist(), strict=True)
    return {
        row: TokenLogprobs(
            chosen=TokenLogprob(token_id=tokens[row], logprob=chosen),
            top=tuple(
                TokenLogprob(token_id=token, logprob=value)
                for token, value in list(zip(top_ids, top_values, strict=True))[: params[row].logprobs]
            ),
        )
        for row, chosen, top_ids, top_values in found
    }
