"""The text-guided sampler and the balance losses against naive loops and hand-computed cases."""

import math

import pytest
import torch

from services.sampler.balance import balance_loss
from services.sampler.text_guided import apply_rotary, keep_by_ratio, keep_by_share, text_importance


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
def test_importance_equals_the_naive_loop(heads, groups):
    torch.manual_seed(0)
    query, key, scaling = torch.randn(5, heads, 8), torch.randn(11, groups, 8), 8**-0.5
    expected = torch.zeros(11)
    for t in range(5):
        rows = []
        for h in range(heads):
            scores = [float(query[t, h] @ key[j, h // (heads // groups)]) * scaling for j in range(11)]
            total = sum(math.exp(s) for s in scores)
            rows.append([math.exp(s) / total for s in scores])
        for j in range(11):
            expected[j] += max(row[j] for row in rows) / 5
    torch.testing.assert_close(text_importance(query, key, scaling), expected)


def naive_keep(importance, threshold):
    order = sorted(range(len(importance)), key=lambda j: -importance[j])
    kept, reached = [], 0.0
    for j in order:
        if reached >= threshold * sum(importance):
            break
        kept.append(j)
        reached += importance[j]
    return sorted(kept)


@pytest.mark.parametrize("threshold", [0.01, 0.3, 0.5, 0.85, 0.99])
def test_selection_equals_the_naive_loop(threshold):
    torch.manual_seed(1)
    for _ in range(20):
        importance = torch.rand(37).double()
        assert keep_by_share(importance, threshold).tolist() == naive_keep(importance.tolist(), threshold)


def test_selection_by_hand():
    importance = torch.tensor([0.1, 0.4, 0.2, 0.3])
    assert keep_by_share(importance, 0.7).tolist() == [1, 3]
    assert keep_by_share(importance, 0.71).tolist() == [1, 2, 3]
    assert keep_by_share(importance, 1.0).tolist() == [0, 1, 2, 3]
    assert keep_by_share(torch.ones(4), 0.5).tolist() == [0, 1]
    assert keep_by_share(torch.zeros(0), 0.5).tolist() == []


@pytest.mark.parametrize(("ratio", "count"), [(1.0, 30), (0.75, 23), (0.5, 15), (0.1, 3), (0.7, 21), (1e-9, 1)])
def test_a_ratio_keeps_that_share_rounded_up_and_the_most_important(ratio, count):
    importance = torch.rand(30, generator=torch.Generator().manual_seed(2))
    kept = keep_by_ratio(importance, ratio).tolist()
    assert kept == sorted(sorted(range(30), key=lambda j: -importance[j])[:count])


def test_a_ratio_by_hand():
    assert keep_by_ratio(torch.tensor([0.1, 0.4, 0.2, 0.4]), 0.25).tolist() == [1]
    assert keep_by_ratio(torch.tensor([0.1, 0.4, 0.2, 0.4]), 0.51).tolist() == [1, 2, 3]
    assert keep_by_ratio(torch.ones(4), 0.5).tolist() == [0, 1]
    assert keep_by_ratio(torch.zeros(0), 0.5).tolist() == []


def test_rotary_equals_the_decoders_own():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    query, angle = torch.randn(1, 3, 7, 8), torch.rand(1, 7, 8)
    expected, _ = apply_rotary_pos_emb(query, query, angle.cos(), angle.sin())
    ours = apply_rotary(query[0].transpose(0, 1), angle[0].cos(), angle[0].sin())
    torch.testing.assert_close(ours, expected[0].transpose(0, 1))


def test_balance_loss_by_hand():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1]])
    # F = (2/3, 1/3, 0), P = (1.4, 1.3, 0.3) / 3
    expected = 3 * (2 / 3 * 1.4 / 3 + 1 / 3 * 1.3 / 3)
    assert balance_loss(probs).item() == pytest.approx(expected)
    # c = (1, 2, 3) rescaled to (0.5, 1, 1.5)
    weighted = 3 * (0.5 * 2 / 3 * 1.4 / 3 + 1.0 * 1 / 3 * 1.3 / 3)
    assert balance_loss(probs, (1, 2, 3)).item() == pytest.approx(weighted)
    assert balance_loss(probs, (1, 1, 1)).item() == pytest.approx(expected)


def test_balance_loss_pushes_against_the_crowded_branch():
    logits = torch.tensor([[2.0, 0.0, 0.0]] * 5, requires_grad=True)
    balance_loss(logits.softmax(-1)).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()
