"""The text-guided sampler against naive loops and hand-computed cases."""

from __future__ import annotations

import pytest
import torch

from services.sampler.text_guided import apply_rotary, keep_by_ratio, keep_by_share, text_importance
from tests.unit.sampler import oracles as oracle


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
def test_importance_equals_the_naive_loop(heads, groups):
    torch.manual_seed(0)
    query, key, scaling = torch.randn(5, heads, 8), torch.randn(11, groups, 8), 8**-0.5
    expected = torch.tensor(oracle.importance(query.tolist(), key.tolist(), scaling))
    torch.testing.assert_close(text_importance(query, key, scaling), expected)


@pytest.mark.parametrize("threshold", [0.01, 0.3, 0.5, 0.85, 0.99, 1.0])
def test_selection_equals_the_naive_loop(threshold):
    torch.manual_seed(1)
    for _ in range(20):
        importance = torch.rand(37).double()
        assert keep_by_share(importance, threshold).tolist() == oracle.kept(importance.tolist(), threshold)
        tied = torch.randint(1, 4, (37,)).double()
        assert keep_by_share(tied, threshold).tolist() == oracle.kept(tied.tolist(), threshold)


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
