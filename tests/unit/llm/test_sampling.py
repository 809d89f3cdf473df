"""Drawing tokens: every setting against a naive oracle, seeds, batches, log probabilities."""

from __future__ import annotations

import collections
import math

import pytest
import torch
from transformers.generation import logits_process as hf

from services.common.types import SampledToken, SamplingParams
from services.llm.kernels import sampling
from services.llm.kernels.sampling import new_generator, sample

PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])
VOCABULARY = 40


def alone(logits_V: torch.Tensor, params: SamplingParams, generator=None, prompt=(), output=()) -> SampledToken:
    (token,) = sample(logits_V[None], [params], [generator or new_generator(params)], [prompt], [output])
    return token


def draws(params: SamplingParams, count: int, logits_V: torch.Tensor, prompt=(), output=()) -> list[int]:
    """Draws `count` tokens from the same logits with one generator."""
    rows = logits_V.expand(count, -1)
    tokens = sample(rows, [params] * count, [new_generator(params)] * count, [prompt] * count, [output] * count)
    return [token.token_id for token in tokens]


def oracle(logits_V: torch.Tensor, params: SamplingParams, prompt=(), output=()) -> list[float]:
    """The distribution that a row is drawn from, token by token."""
    scores = logits_V.double().tolist()
    for token in {*prompt, *output}:
        if 0 <= token < len(scores):
            factor = params.repetition_penalty
            scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token, times in collections.Counter(output).items():
        if 0 <= token < len(scores):
            scores[token] -= params.frequency_penalty * times + params.presence_penalty
    scores = [score / params.temperature for score in scores]
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if params.top_k:
        order = order[: params.top_k]

    def shares(tokens: list[int]) -> dict[int, float]:
        weights = {token: math.exp(scores[token] - scores[order[0]]) for token in tokens}
        return {token: weight / sum(weights.values()) for token, weight in weights.items()}

    if params.top_p < 1:
        kept, reached = [], 0.0
        for token, share in shares(order).items():
            if reached >= params.top_p:
                break
            kept.append(token)
            reached += share
        order = kept
    left = shares(order)
    order = [token for token in order if left[token] >= params.min_p * left[order[0]]]
    return [shares(order).get(token, 0.0) for token in range(len(scores))]


def logits(rows: int, vocabulary: int = VOCABULARY, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 10, "top_p": 0.8},
    {"top_k": 10, "top_p": 0.95, "min_p": 0.1, "temperature": 1.5},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"presence_penalty": -1.0},
    {"frequency_penalty": 0.7},
    {"frequency_penalty": -0.4, "presence_penalty": 0.5, "repetition_penalty": 1.3, "top_p": 0.9, "temperature": 0.7},
]
PROMPT, OUTPUT = [3, 5, 5, 128_000, -1, 7], [7, 9, 9, 9, 11, 5]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_follow_the_oracles_distribution(settings: dict) -> None:
    params = SamplingParams(**{"temperature": 1.0, "seed": 4, **settings})
    for row in logits(2):
        expected = torch.tensor(oracle(row, params, PROMPT, OUTPUT))
        found = torch.bincount(torch.tensor(draws(params, 4000, row, PROMPT, OUTPUT)), minlength=VOCABULARY) / 4000
        assert (found[expected == 0] == 0).all()
        assert (found - expected).abs().max() < 0.03


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_uniform_number_picks_the_oracles_token(settings: dict) -> None:
    """The draw inverts the cumulative distribution: in order of probability where it is limited, else of ids."""
    params = SamplingParams(**{"temperature": 1.0, **settings})
    for seed in range(100):
        row = logits(1, seed=seed)[0]
        expected = oracle(row, params, PROMPT, OUTPUT)
        tokens = list(range(VOCABULARY))
        if params.top_k or params.top_p < 1 or params.min_p:
            tokens.sort(key=lambda token: -expected[token])
        uniform = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).item()
        reached = 0.0
        for token in tokens:
            reached += expected[token]
            if reached > uniform:
                break
        generator = torch.Generator().manual_seed(seed)
        assert alone(row, params, generator, PROMPT, OUTPUT).token_id == token


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}, {"repetition_penalty": 1.4}])
def test_the_oracle_is_transformers(settings: dict) -> None:
    processors = {
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
        "repetition_penalty": hf.RepetitionPenaltyLogitsProcessor,
    }
    rows, ids = logits(8), torch.tensor([[3, 5, 5, 7, 7, 9]] * 8)
    (name, value), *_ = settings.items()
    theirs = processors[name](value)(ids, rows.clone()).softmax(-1)
    params = SamplingParams(temperature=1.0, **settings)
    ours = torch.tensor([oracle(row, params, ids[0].tolist()[:4], ids[0].tolist()[4:]) for row in rows])
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_greedy_takes_the_likeliest_and_the_first_of_equals_and_draws_nothing() -> None:
    rows = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, 1.0]])
    greedy = SamplingParams(top_k=1, top_p=0.5, min_p=0.5)
    generator = new_generator(greedy)
    before = generator.get_state()
    found = sample(rows, [greedy] * 2, [generator] * 2, [()] * 2, [()] * 2)
    assert found == [SampledToken(token_id=1), SampledToken(token_id=0)]
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("penalty", [1e-38, 1e-50])
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"frequency_penalty": 2.0}])
def test_a_repetition_penalty_that_overflows_leaves_the_tokens_seen(penalty: float, settings: dict) -> None:
    row = torch.tensor([1.0, 30.0, -2.0, 40.0, 0.0, 50.0])
    params = SamplingParams(temperature=1.0, seed=1, repetition_penalty=penalty, **settings)
    assert set(draws(params, 200, row, [1, 2, 4], [3])) == {1, 3}
    assert alone(row, SamplingParams(repetition_penalty=penalty), prompt=[3, 2, 4, 1]).token_id == 1


@pytest.mark.parametrize("vocabulary", [VOCABULARY, 2000])
def test_a_top_k_of_any_size_is_all_tokens(vocabulary: int) -> None:
    row = logits(1, vocabulary)[0]
    free, huge = (SamplingParams(temperature=1.0, seed=3, top_p=0.9, top_k=k) for k in (0, 2**63))
    assert draws(free, 50, row) == draws(huge, 50, row)


def test_greedy_obeys_penalties_and_leaves_the_logits_alone() -> None:
    rows = torch.tensor([[2.0, 1.9, -1.0], [2.0, 1.9, -1.0], [-1.0, -1.1, -3.0], [2.0, 1.9, -1.0]])
    before = rows.clone()
    params = [
        SamplingParams(repetition_penalty=1.2),
        SamplingParams(presence_penalty=0.2),  # of the answer only
        SamplingParams(repetition_penalty=1.2),
        SamplingParams(),
    ]
    found = sample(rows, params, [new_generator(p) for p in params], [[0]] * 4, [[]] * 4)
    assert [token.token_id for token in found] == [1, 0, 1, 0]
    found = sample(rows, params, [new_generator(p) for p in params], [[]] * 4, [[0]] * 4)
    assert [token.token_id for token in found] == [1, 1, 1, 0]
    assert torch.equal(rows, before)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.3, [1]), (0.39, [1]), (0.41, [1, 3]), (0.8, [1, 3, 4]), (0.99, [0, 1, 2, 3, 4])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: list[int]) -> None:
    params = SamplingParams(temperature=1.0, top_p=top_p, seed=1)
    assert sorted(set(draws(params, 1000, PROBABILITIES.log()))) == kept


def test_of_equal_tokens_the_smaller_ids_are_kept() -> None:
    row = torch.zeros(2000)
    for settings in ({"top_k": 3}, {"top_p": 0.0015}, {"top_k": 600, "top_p": 0.005}):
        params = SamplingParams(temperature=1.0, seed=0, **settings)
        assert set(draws(params, 60, row)) == {0, 1, 2}


MIXED = [SamplingParams(**{"temperature": 1.0, "seed": seed, **settings}) for seed, settings in enumerate(SETTINGS)]
MIXED += [SamplingParams(temperature=0.0, logprobs=3), SamplingParams(temperature=1.0, seed=5, logprobs=0, top_p=0.999)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_comes_out_the_same_in_any_batch(dtype: torch.dtype) -> None:
    """A row is the same bit for bit, logprobs too, with ties (bfloat16) and with nuclei wider than the candidates."""
    rows = logits(len(MIXED), 5000).to(dtype)
    outputs: list[list[int]] = [[] for _ in MIXED]
    together, apart = ([new_generator(p) for p in MIXED] for _ in range(2))
    for _ in range(6):
        batch = sample(rows, MIXED, together, [PROMPT] * len(MIXED), outputs)
        for i, params in enumerate(MIXED):
            assert alone(rows[i], params, apart[i], PROMPT, outputs[i]) == batch[i]
            outputs[i].append(batch[i].token_id)
        shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
        for some in (shuffled[:7].tolist(), shuffled[3:].tolist()):
            states = [torch.Generator().manual_seed(9) for _ in some]
            fresh = sample(rows[some], [MIXED[i] for i in some], states, [PROMPT] * len(some), [OUTPUT] * len(some))
            for i, token in zip(some, fresh, strict=True):
                assert token == alone(rows[i], MIXED[i], torch.Generator().manual_seed(9), PROMPT, OUTPUT)


@pytest.mark.parametrize("settings", [{"top_p": 0.7}, {"top_k": 50, "top_p": 0.9}, {"top_k": 700}, {"min_p": 0.02}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_candidates_change_nothing(settings: dict, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.cat([logits(16, 3000), 4 * logits(16, 3000, seed=1)]).to(dtype)
    params = [SamplingParams(temperature=1.0, seed=seed, **settings) for seed in range(len(rows))]

    def tokens() -> list[SampledToken]:
        return sample(rows, params, [new_generator(p) for p in params], [()] * len(rows), [()] * len(rows))

    with_candidates = tokens()
    monkeypatch.setattr(sampling, "CANDIDATES", 3000)
    assert tokens() == with_candidates


def test_every_draw_takes_one_uniform_number() -> None:
    for settings in SETTINGS:
        params = SamplingParams(**{"temperature": 1.0, "seed": 3, **settings})
        drawn, counted = new_generator(params), new_generator(params)
        for _ in range(5):
            alone(logits(1)[0], params, drawn, PROMPT, OUTPUT)
            torch.rand((), generator=counted, dtype=torch.float64)
        assert torch.equal(drawn.get_state(), counted.get_state())


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_p": 0.9}])
def test_a_tiny_temperature_is_greedy_and_not_nan(settings: dict) -> None:
    for temperature in (1e-30, 1e-60):
        params = SamplingParams(temperature=temperature, seed=0, **settings)
        assert alone(torch.tensor([1e4, 9e3, -1e4]), params).token_id == 0


@pytest.mark.parametrize("settings", [{}, {"top_k": 4}, {"top_p": 0.999}, {"min_p": 1e-6}])
def test_impossible_tokens_are_never_drawn(settings: dict) -> None:
    params = SamplingParams(temperature=1.0, seed=3, **settings)
    row = torch.tensor([0.5, 0.0, 0.5, 0.0]).log()
    assert set(draws(params, 500, row)) == {0, 2}
    # A uniform number that rounds up to the whole mass does not draw it either.
    largest = torch.tensor([[1 - 2**-53]], dtype=torch.float64)
    cumulative = row.softmax(-1)[None].cumsum(-1, dtype=torch.float64)
    assert sampling._pick(cumulative, cumulative[:, -1:], largest).item() == 2


def test_a_row_of_nan_does_not_fail_its_batch() -> None:
    rows = torch.stack([torch.full((9,), torch.nan), logits(1, 9)[0]])
    for settings in SETTINGS:
        params = [SamplingParams(**{"temperature": 1.0, "seed": 3, "logprobs": 2, **settings})] * 2
        found = sample(rows, params, [new_generator(p) for p in params], [()] * 2, [()] * 2)
        assert 0 <= found[0].token_id < 9
        assert found[1] == alone(rows[1], params[1])


def test_without_a_seed_draws_differ_and_every_seed_in_range_works() -> None:
    free = SamplingParams(temperature=1.0)
    assert len({torch.rand((), generator=new_generator(free)).item() for _ in range(5)}) == 5
    for seed in (0, 2**63, 2**64 - 1):
        new_generator(SamplingParams(seed=seed))


def test_logprobs_are_those_of_the_raw_logits() -> None:
    rows = logits(3, 50)
    settings = {"temperature": 1.7, "top_k": 4, "repetition_penalty": 1.9, "frequency_penalty": 1.0, "seed": 2}
    params = [
        SamplingParams(logprobs=20, **settings),
        SamplingParams(logprobs=0, **settings),
        SamplingParams(**settings),
    ]
    expected = rows.double().log_softmax(-1)
    found = sample(rows, params, [new_generator(p) for p in params], [PROMPT] * 3, [OUTPUT] * 3)
    for row in range(2):
        chosen = found[row].logprob.chosen
        assert chosen.token_id == found[row].token_id
        assert chosen.logprob == pytest.approx(expected[row, chosen.token_id].item(), abs=1e-5)
    values, ids = expected[0].topk(20)
    assert [token.token_id for token in found[0].logprob.top] == ids.tolist()
    assert [token.logprob for token in found[0].logprob.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert found[1].logprob.top == () and found[2].logprob is None


def test_logprobs_of_a_whole_vocabulary_sum_to_one_and_equals_stand_by_id() -> None:
    row = torch.tensor([1.0, 3.0, 3.0, -2.0, 1.0])
    token = alone(row, SamplingParams(logprobs=20))
    assert [entry.token_id for entry in token.logprob.top] == [1, 2, 0, 4, 3]
    assert sum(math.exp(entry.logprob) for entry in token.logprob.top) == pytest.approx(1, abs=1e-6)
    assert token.logprob.chosen == token.logprob.top[0]
