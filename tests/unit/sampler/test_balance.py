"""The balance loss and its weighted ("imbalance") form against loops, hand-computed cases and finite differences."""

from __future__ import annotations

import pytest
import torch

from services.sampler.balance import balance_loss, chosen_branches
from tests.unit.sampler import oracles as oracle
from training.question_settings import LossWeights

COEFFICIENTS = {2: (3.0, 1.0), 3: (7.1, 5.0, 1.5), 7: (7.0, 6.0, 5.0, 0.0, 3.0, 2.0, 1.0)}


def distributions(regions: int, branches: int) -> torch.Tensor:
    torch.manual_seed(regions)
    return torch.randn(regions, branches, dtype=torch.float64).softmax(1)


def test_by_hand():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1]])
    # F = (2/3, 1/3, 0), P = (1.4, 1.3, 0.3) / 3
    expected = 3 * (2 / 3 * 1.4 / 3 + 1 / 3 * 1.3 / 3)
    assert balance_loss(probs).item() == pytest.approx(expected)
    # c = (1, 2, 3) rescaled to (0.5, 1, 1.5)
    weighted = 3 * (0.5 * 2 / 3 * 1.4 / 3 + 1.0 * 1 / 3 * 1.3 / 3)
    assert balance_loss(probs, (1, 2, 3)).item() == pytest.approx(weighted)
    assert balance_loss(probs, (1, 1, 1)).item() == pytest.approx(expected)


@pytest.mark.parametrize("branches", [2, 3, 7])
@pytest.mark.parametrize("regions", [1, 5, 40])
def test_equals_the_naive_loop(regions, branches):
    probs_MK = distributions(regions, branches)
    for coefficients in (None, COEFFICIENTS[branches]):
        expected = oracle.balance(probs_MK.tolist(), coefficients)
        assert balance_loss(probs_MK, coefficients).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("branches", [2, 3, 7])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_is_the_naive_loops(branches, weighted):
    """F does not move with p but where a region changes its mind, so P alone has a gradient."""
    coefficients = COEFFICIENTS[branches] if weighted else None
    probs_MK = distributions(6, branches).requires_grad_()
    balance_loss(probs_MK, coefficients).backward()
    for m, k in ((0, 0), (3, branches - 1), (5, 1)):
        ends = []
        for step in (1e-6, -1e-6):
            moved = probs_MK.tolist()
            moved[m][k] += step
            ends.append(oracle.balance(moved, coefficients))
        assert probs_MK.grad[m, k].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-3, abs=1e-6)


def test_even_use_is_one_and_collapse_is_the_number_of_branches():
    assert balance_loss(torch.eye(3)).item() == pytest.approx(1)
    assert balance_loss(torch.eye(3)[[0, 0, 0, 0]]).item() == pytest.approx(3)


def test_the_parts_of_a_global_batch_add_up_to_its_loss():
    probs_MK, counts_K = distributions(40, 3), torch.zeros(3)
    counts_K += chosen_branches(probs_MK)
    parts = [balance_loss(part, COEFFICIENTS[3], counts_K=counts_K, regions=40) for part in probs_MK.split([7, 33])]
    assert sum(parts).item() == pytest.approx(balance_loss(probs_MK, COEFFICIENTS[3]).item(), rel=1e-6)


def test_bfloat16_is_summed_in_float32():
    probs_MK = distributions(4000, 3)
    expected = oracle.balance(probs_MK.bfloat16().tolist())
    found = balance_loss(probs_MK.bfloat16())
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected, rel=1e-5)


def test_weight_rises_to_alpha_in_the_warm_up():
    weights = LossWeights(balance=0.1, balance_warmup=4)
    assert [weights.balance_at(step) for step in (0, 1, 3, 4, 100)] == pytest.approx([0.025, 0.05, 0.1, 0.1, 0.1])
    assert LossWeights(balance=0.1).balance_at(0) == 0.1


def test_pushes_against_the_crowded_branch():
    logits = torch.tensor([[2.0, 0.0, 0.0]] * 5, requires_grad=True)
    balance_loss(logits.softmax(-1)).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()
