"""The vision-guided sampler against a naive loop, partial edge regions included; gradients of its three gates."""

import pytest
import torch

from services.sampler.vision_guided import VisionGuidedSampler, split_regions

D, BASE = 8, 9


def sampler(**changes):
    torch.manual_seed(0)
    built = VisionGuidedSampler(D, BASE, **changes)
    # A selector with large weights makes every branch occur.
    torch.nn.init.normal_(built.selector.linear.weight, std=2.0)
    return built


def naive(built, map_HWD, newline_D, branch_ids):
    """Eq. 1 with loops: region by region, cell by cell, over real tokens only."""
    height, width, _ = map_HWD.shape
    w, tokens, region = built.window, [], 0
    for top in range(0, height, w):
        for left in range(0, width, w):
            kernel_h, kernel_w = built.branches[branch_ids[region]]
            for y in range(top, min(top + w, height), kernel_h):
                for x in range(left, min(left + w, width), kernel_w):
                    real = [
                        map_HWD[i, j]
                        for i in range(y, min(y + kernel_h, height, top + w))
                        for j in range(x, min(x + kernel_w, width, left + w))
                    ]
                    tokens.append(torch.stack(real).amax(0))
            region += 1
        tokens.append(newline_D)
    return torch.stack(tokens)


@pytest.mark.parametrize("size", [(8, 8), (6, 9), (4, 4), (3, 2), (13, 5), (1, 1)])
@pytest.mark.parametrize("selector_input", ["base_tile", "region"])
@pytest.mark.parametrize("similarity", ["inner_product", "normalized"])
def test_equals_the_naive_loop(size, selector_input, similarity):
    built = sampler(selector_input=selector_input, similarity=similarity).eval()
    # Negative values would show a zero that leaked from padding into a max.
    map_HWD, base, newline = -torch.rand(*size, D) - 1, torch.randn(BASE, D), torch.randn(D)
    out = built(map_HWD, base, newline)
    assert out.branch_ids_M.tolist() == out.probs_MK.argmax(1).tolist()
    assert torch.equal(out.tokens_ND, naive(built, map_HWD, newline, out.branch_ids_M.tolist()))
    assert out.region_grid == (-(-size[0] // 4), -(-size[1] // 4))


def test_seven_branches_and_other_windows_equal_the_naive_loop():
    seven = ((1, 1), (2, 2), (4, 4), (4, 2), (2, 4), (2, 1), (1, 2))
    for window, branches in (
        (4, seven),
        (8, ((1, 1), (2, 2), (4, 4))),
        (12, ((1, 1), (2, 2), (4, 4))),
        (2, ((1, 1), (2, 2))),
    ):
        built = sampler(window=window, branches=branches).eval()
        map_HWD, base, newline = torch.randn(23, 17, D), torch.randn(BASE, D), torch.randn(D)
        out = built(map_HWD, base, newline)
        assert len(set(out.branch_ids_M.tolist())) > 1
        assert torch.equal(out.tokens_ND, naive(built, map_HWD, newline, out.branch_ids_M.tolist()))


def test_base_tile_similarity_is_the_papers_formula():
    built = sampler(region_pool="mean").eval()
    map_HWD, base = torch.randn(6, 4, D), torch.randn(BASE, D)
    probs = built(map_HWD, base, torch.zeros(D)).probs_MK
    linear = built.selector.linear
    for region, rows in enumerate((map_HWD[:4], map_HWD[4:])):
        similarity = rows.reshape(-1, D).mean(0) @ base.T
        expected = (linear.weight @ similarity + linear.bias).softmax(0)
        torch.testing.assert_close(probs[region], expected)


@pytest.mark.parametrize("gate", ["paper", "straight_through", "counterfactual"])
@pytest.mark.parametrize("selector_input", ["base_tile", "region"])
def test_gradient_reaches_the_selector(gate, selector_input):
    built = sampler(probability_gate=gate, selector_input=selector_input).train()
    map_HWD = torch.randn(7, 9, D, requires_grad=True)
    out = built(map_HWD, torch.randn(BASE, D), torch.zeros(D))
    (out.tokens_ND * torch.randn_like(out.tokens_ND)).sum().backward()
    gradient = built.selector.linear.weight.grad
    assert gradient is not None and torch.isfinite(gradient).all() and gradient.abs().sum() > 0
    assert map_HWD.grad is not None and map_HWD.grad.abs().sum() > 0


def test_gates_differ_in_value_as_documented():
    map_HWD, base, newline = torch.randn(8, 8, D), torch.randn(BASE, D), torch.zeros(D)
    plain = sampler().eval()(map_HWD, base, newline)
    for gate in ("straight_through", "counterfactual"):
        forward = sampler(probability_gate=gate).train()(map_HWD, base, newline)
        torch.testing.assert_close(forward.tokens_ND, plain.tokens_ND)
    scaled = sampler(probability_gate="paper").train()(map_HWD, base, newline)
    chosen = plain.probs_MK.amax(1)
    first = len(naive(sampler(), map_HWD[:4, :4], newline, [int(plain.branch_ids_M[0])])) - 1
    torch.testing.assert_close(scaled.tokens_ND[:first], plain.tokens_ND[:first] * chosen[0])


def test_counterfactual_gradient_is_that_of_having_used_the_other_branch():
    """With everything at 1x1, d loss / d p of 4x4 is the loss's inner product with the region's maximum, repeated."""
    built = VisionGuidedSampler(D, BASE, probability_gate="counterfactual", selector_input="region").train()
    torch.nn.init.zeros_(built.selector.linear.weight)
    with torch.no_grad():
        built.selector.linear.bias.copy_(torch.tensor([5.0, 0, 0]))
    map_HWD, weight = torch.randn(4, 4, D), torch.randn(16, D)
    out = built(map_HWD, torch.randn(BASE, D), torch.zeros(D))
    out.probs_MK.retain_grad()
    (out.tokens_ND[:16] * weight).sum().backward()
    coarse = map_HWD.flatten(0, 1).amax(0).expand(16, D)
    torch.testing.assert_close(out.probs_MK.grad[0, 2], (coarse * weight).sum())
    torch.testing.assert_close(out.probs_MK.grad[0, 0], (map_HWD.flatten(0, 1) * weight).sum())


def test_partial_regions_count_real_tokens_only():
    _, real, grid = split_regions(torch.zeros(5, 6, D), 4)
    assert grid == (2, 2)
    assert real.flatten(1).sum(1).tolist() == [16, 8, 4, 2]
