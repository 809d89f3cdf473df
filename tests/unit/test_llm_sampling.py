"""Drawing tokens: greedy, temperature, top-p, seeds."""

from __future__ import annotations

import pytest
import torch

from services.common.errors import InvalidInput
from services.common.types import SamplingParams
from services.llm.sampling import check_sampling, new_generator, sample

PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])


def draws(params: SamplingParams, count: int, probabilities: torch.Tensor = PROBABILITIES) -> torch.Tensor:
    generator = new_generator(params)
    tokens = [sample(probabilities.log()[None], [params], [generator])[0] for _ in range(count)]
    return torch.bincount(torch.tensor(tokens), minlength=len(probabilities)) / count


def test_greedy_takes_the_likeliest_and_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, 1.0]])
    greedy = SamplingParams()
    assert sample(logits, [greedy, greedy], [new_generator(greedy)] * 2) == [1, 0]


def test_temperature_one_draws_the_models_own_distribution() -> None:
    assert (draws(SamplingParams(temperature=1.0, seed=0), 4000) - PROBABILITIES).abs().max() < 0.03


def test_temperature_sharpens_and_flattens() -> None:
    cold = PROBABILITIES**2 / (PROBABILITIES**2).sum()
    assert (draws(SamplingParams(temperature=0.5, seed=0), 4000) - cold).abs().max() < 0.03
    hot = PROBABILITIES**0.5 / (PROBABILITIES**0.5).sum()
    assert (draws(SamplingParams(temperature=2.0, seed=0), 4000) - hot).abs().max() < 0.03


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.3, [1]), (0.39, [1]), (0.41, [1, 3]), (0.8, [1, 3, 4]), (0.99, [0, 1, 2, 3, 4])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: list[int]) -> None:
    expected = torch.zeros(5)
    expected[kept] = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
    frequency = draws(SamplingParams(temperature=1.0, top_p=top_p, seed=1), 3000)
    assert (frequency > 0).nonzero().flatten().tolist() == kept
    assert (frequency - expected).abs().max() < 0.03


def test_a_row_draws_the_same_in_any_batch() -> None:
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(0)) * 2
    params = [SamplingParams(temperature=t, top_p=p, seed=s) for t, p, s in [(1, 1, 0), (0, 1, 1), (0.7, 0.5, 2)] * 2]
    together = [new_generator(p) for p in params]
    alone = [new_generator(p) for p in params]
    for _ in range(20):
        batch = sample(logits, params, together)
        assert batch == [sample(logits[i : i + 1], [params[i]], [alone[i]])[0] for i in range(6)]


def test_a_tiny_temperature_is_greedy_and_not_nan() -> None:
    logits = torch.tensor([[1e4, 9e3, -1e4]])
    params = SamplingParams(temperature=1e-30, seed=0)
    assert sample(logits, [params], [new_generator(params)]) == [0]


def test_impossible_tokens_are_never_drawn() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.5, 0.0])
    assert draws(SamplingParams(temperature=1.0, seed=3), 500, probabilities)[[1, 3]].sum() == 0


def test_without_a_seed_draws_differ_and_every_seed_in_range_works() -> None:
    free = SamplingParams(temperature=1.0)
    assert len({torch.rand((), generator=new_generator(free)).item() for _ in range(5)}) == 5
    for seed in (0, 2**63, 2**64 - 1):
        new_generator(SamplingParams(seed=seed))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "sampling.max_tokens: is 0"),
        ({"temperature": -0.1}, "sampling.temperature: is -0.1"),
        ({"temperature": 2.1}, "sampling.temperature: is 2.1"),
        ({"temperature": float("nan")}, "sampling.temperature: is nan"),
        ({"top_p": 0.0}, "sampling.top_p: is 0.0"),
        ({"top_p": 1.1}, "sampling.top_p: is 1.1"),
        ({"top_p": float("nan")}, "sampling.top_p: is nan"),
        ({"seed": -1}, "sampling.seed: is -1"),
        ({"seed": 2**64}, "sampling.seed"),
        ({"stop": ("a", "")}, "sampling.stop: has an empty string"),
        ({"stop": ("a",) * 9}, "sampling.stop: has 9 strings, at most 8"),
    ],
)
def test_values_that_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        check_sampling(SamplingParams(**changes))
