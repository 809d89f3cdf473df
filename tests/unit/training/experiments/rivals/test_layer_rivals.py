"""Rivals inside the LLM: importance, who asks, stages and their token counts, against naive loops."""

import math

import pytest
import torch

from services.common.errors import InvalidInput
from services.modeling.packing import TrainedSequence, pack
from training.experiments.rivals.fastv import FastV
from training.experiments.rivals.layers import asking_tokens, converted_share, keep_stage
from training.experiments.rivals.pyramid_drop import PyramidDrop
from training.experiments.rivals.registry import LAYER_RIVALS, layer_rival


@pytest.mark.parametrize("rival", [FastV(), PyramidDrop()])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_importance_equals_the_naive_loop(rival, heads, groups, dtype):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads, 8, generator=generator).to(dtype)
    key = torch.randn(11, groups, 8, generator=generator).to(dtype)
    expected = torch.zeros(11)
    for t in range(2):
        for h in range(heads):
            of = h // (heads // groups)
            weights = [math.exp(float(query[t, h].double() @ key[j, of].double()) * 0.3) for j in range(11)]
            for j in range(11):
                expected[j] += weights[j] / sum(weights) / heads / 2
    importance = rival.importance(query, key, 0.3)
    assert importance.dtype == torch.float32
    torch.testing.assert_close(importance, expected)


def test_who_asks():
    # A prefix of two tokens, then branches of five: two turns' words in the first, no words in the second.
    instruction = torch.tensor([0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0]).bool()
    labels = torch.full((12,), -100)
    labels[[6, 9, 10, 11]] = 5
    sequence = TrainedSequence(input_ids=torch.ones(12).long(), labels=labels, instruction=instruction, branches=(5, 5))
    packed = pack([sequence], [], image_token_id=9, device=torch.device("cpu"))
    assert asking_tokens("last_instruction_token", packed).nonzero()[:, 0].tolist() == [4]
    assert asking_tokens("last_prompt_token", packed).nonzero()[:, 0].tolist() == [5, 8]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("total", [1, 2, 7, 40, 577])
def test_stages_equal_the_naive_loop(tied, total):
    """Each stage leaves ceil(share * total), the best of those still there, in order."""
    rival = PyramidDrop(layers=(1, 2, 4), ratio=0.5)
    generator = torch.Generator().manual_seed(total)
    there, naive = torch.arange(total), list(range(total))
    for _, share in rival.stages:
        values = torch.rand(total, generator=generator)
        values = (values * 3).floor() if tied else values
        there = there[keep_stage(values[there], share, total)]
        worth = values.tolist()
        naive = sorted(sorted(naive, key=lambda j: (-worth[j], j))[: max(math.ceil(share * total), 1)])
        assert there.tolist() == naive


def test_stages_of_the_papers():
    assert FastV().stages == ((2, 0.5),)
    assert PyramidDrop().stages == ((8, 0.5), (16, 0.25), (24, 0.125))
    # (1 + 1/2 + 1/4 + 1/8) / 4, and two layers of 32 at full count.
    assert converted_share(PyramidDrop().stages, 32) == pytest.approx(0.46875)
    assert converted_share(FastV().stages, 32) == pytest.approx((2 + 15) / 32)
    assert converted_share((), 6) == 1.0


@pytest.mark.parametrize("name", LAYER_RIVALS)
@pytest.mark.parametrize("layers", [4, 6, 28, 32])
@pytest.mark.parametrize("budget", [0.6, 0.75, 1.0])
def test_a_budget_is_the_share_that_the_layers_see_on_average(name, layers, budget):
    rival = layer_rival(name, budget=budget, layers=layers)
    per_layer, share = [], 1.0
    for layer in range(layers):
        share = dict(rival.stages).get(layer, share)
        per_layer.append(share)
    assert sum(per_layer) / layers == pytest.approx(budget)
    assert all(0 < layer < layers for layer, _ in rival.stages)


def test_quarters_of_small_and_large_models():
    assert [layer for layer, _ in layer_rival("pyramid_drop", budget=0.5, layers=6).stages] == [1, 3, 4]
    assert [layer for layer, _ in layer_rival("pyramid_drop", budget=0.5, layers=32).stages] == [8, 16, 24]
    paper = layer_rival("pyramid_drop", budget=0.46875, layers=32)
    assert [share for _, share in paper.stages] == pytest.approx([0.5, 0.25, 0.125])


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        ("nobody", {"budget": 0.5, "layers": 6}, "rival"),
        ("fastv", {"budget": 0.25, "layers": 6}, "budget"),
        ("fastv", {"budget": 0.5, "layers": 2}, "layers"),
        ("fastv", {"budget": 1.5, "layers": 6}, "budget"),
        ("fastv", {"budget": 0.5, "layers": 6, "asks": "first"}, "asks"),
        ("pyramid_drop", {"budget": 0.1, "layers": 6}, "budget"),
        ("pyramid_drop", {"budget": 0.9, "layers": 6, "stage_layers": (3, 2)}, "layers"),
    ],
)
def test_options_are_checked(name, options, field):
    with pytest.raises(InvalidInput) as caught:
        layer_rival(name, **options)
    assert caught.value.field == field
