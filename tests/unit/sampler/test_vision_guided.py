"""The vision-guided sampler with every option against naive loops: values, gradients of its gates, the base tile."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from services.checkpoint.config import FocusLlavaConfig, TextSamplerConfig, VisionSamplerConfig
from services.common.errors import InvalidInput
from services.common.types import ImageTiles, ProjectedFeatureMap
from services.encoder.model import EncoderModel
from services.sampler.vision_guided import VisionGuidedSampler, split_regions
from tests.tiny_checkpoints import grid_pinpoints, text_fields, vision_fields
from tests.unit.sampler import oracles as oracle

D, BASE = 8, 9
SIZES = [(8, 8), (6, 9), (3, 2), (13, 5), (1, 1), (23, 17)]
SELECTIONS: list[dict[str, Any]] = [
    {"selector_input": "region"},
    *(
        {"selector_input": "base_tile", "similarity": similarity, "region_pool": region_pool}
        for similarity, region_pool in itertools.product(("inner_product", "normalized"), ("mean", "max"))
    ),
]
ORDERS = ["region", "row"]
GATES = ["paper", "straight_through", "counterfactual"]


def named(options: dict[str, Any]) -> str:
    return "-".join(options.values())


def of_window(window_and_branches: tuple[int, tuple[oracle.Kernel, ...]]) -> str:
    return f"window{window_and_branches[0]}-{len(window_and_branches[1])}branches"


def sampler(std: float = 1.0, **options: Any) -> VisionGuidedSampler:
    """A sampler whose selector is untrained but not fresh, so that all branches occur."""
    torch.manual_seed(0)
    built = VisionGuidedSampler(D, BASE, **options)
    linear = built.selector.linear
    torch.nn.init.normal_(linear.weight, std=std)
    torch.nn.init.normal_(linear.bias, std=std)
    return built


def selection(built: VisionGuidedSampler, **options: Any) -> oracle.Selection:
    linear = built.selector.linear
    return oracle.Selection(weight=linear.weight.tolist(), bias=linear.bias.tolist(), **options)


def close(actual: torch.Tensor, expected: list, **tolerance: float) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64).view(actual.shape)
    torch.testing.assert_close(actual.double(), wanted, **{"rtol": 1e-4, "atol": 1e-5, **tolerance})


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("window_and_branches", oracle.WINDOWS, ids=of_window)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tokens_equal_the_naive_loop(size, window_and_branches, order):
    window, branches = window_and_branches
    built = sampler(window=window, branches=branches, similarity="normalized", token_order=order).eval()
    # Negative values would show a zero that leaked from padding into a maximum.
    map_HWD, base, newline = -torch.rand(*size, D) - 1, torch.randn(BASE, D), torch.randn(D)
    out = built(map_HWD, base, newline)
    chosen = out.branch_ids_M.tolist()
    expected = oracle.tokens(map_HWD.tolist(), newline.tolist(), window, branches, chosen, order)
    close(out.tokens_ND, expected, rtol=0, atol=0)
    assert out.newlines == expected.count(newline.tolist())
    assert chosen == oracle.likeliest(out.probs_MK.tolist())
    assert torch.equal(out.logits_MK.softmax(-1), out.probs_MK)
    assert out.region_grid == (-(-size[0] // window), -(-size[1] // window))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("window_and_branches", oracle.WINDOWS, ids=of_window)
def test_every_branch_at_every_edge_equals_the_naive_loop(window_and_branches, order):
    window, branches = window_and_branches
    sizes = [(window + 1, 2 * window - 1), (window - 1 or 1, window), (13, 5)]
    for branch, size in itertools.product(range(len(branches)), sizes):
        built = VisionGuidedSampler(D, BASE, window=window, branches=branches, token_order=order).eval()
        torch.nn.init.constant_(built.selector.linear.bias[branch : branch + 1], 9.0)
        map_HWD, newline = -torch.rand(*size, D) - 1, torch.randn(D)
        out = built(map_HWD, torch.randn(BASE, D), newline)
        assert set(out.branch_ids_M.tolist()) == {branch}
        expected = oracle.tokens(map_HWD.tolist(), newline.tolist(), window, branches, out.branch_ids_M.tolist(), order)
        close(out.tokens_ND, expected, rtol=0, atol=0)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_row_by_row_all_regions_at_1x1_are_llava_nexts_own_sequence(size):
    built = VisionGuidedSampler(D, BASE, token_order="row").eval()  # fresh: full resolution everywhere
    map_HWD, newline_D = torch.randn(*size, D), torch.randn(D)
    out = built(map_HWD, torch.randn(BASE, D), newline_D)
    whole_ND = torch.cat((map_HWD, newline_D.expand(size[0], 1, D)), dim=1).flatten(0, 1)
    assert torch.equal(out.tokens_ND, whole_ND) and out.newlines == size[0]


@pytest.mark.parametrize("window_and_branches", oracle.WINDOWS, ids=of_window)
@pytest.mark.parametrize("options", SELECTIONS, ids=named)
def test_probabilities_equal_the_naive_loop(options, window_and_branches):
    window, branches = window_and_branches
    built = sampler(std=0.1, window=window, branches=branches, selector_temperature=1.5, **options)
    for size in [(13, 18), (window + 1, window), (2, 3)]:
        # What all tokens share, as features do, is there too.
        map_HWD, base = torch.randn(*size, D) + 0.5, torch.randn(BASE, D) + 0.5
        out = built.eval()(map_HWD, base, torch.zeros(D))
        looped = oracle.probabilities(
            map_HWD.tolist(), base.tolist(), window, selection(built, temperature=1.5, **options)
        )
        close(out.probs_MK, looped, rtol=1e-3, atol=1e-5)
        # A region chooses the same whether it trains or serves.
        assert torch.equal(built.train()(map_HWD, base, torch.zeros(D)).probs_MK, out.probs_MK)
        assert size != (13, 18) or out.probs_MK.std(0).max() > 0.01


def test_the_two_poolings_and_similarities_do_differ():
    map_HWD, base = torch.randn(6, 4, D), torch.randn(BASE, D)
    found = [sampler(std=0.3, **options)(map_HWD, base, torch.zeros(D)).probs_MK for options in SELECTIONS]
    for one, other in itertools.combinations(found, 2):
        assert not torch.allclose(one, other, atol=1e-2)


GATED: list[tuple[int, tuple[oracle.Kernel, ...]]] = [w for w in oracle.WINDOWS if w[0] <= 4]


@pytest.mark.parametrize(
    ("options", "order"),
    [*((options, "region") for options in SELECTIONS), (SELECTIONS[0], "row")],
    ids=lambda value: value if isinstance(value, str) else named(value),
)
@pytest.mark.parametrize("window_and_branches", GATED, ids=of_window)
@pytest.mark.parametrize("gate", GATES)
def test_gates_values_and_gradients_equal_the_formulas(gate, window_and_branches, options, order):
    """Gradients of selector, map and base tile against central differences of the naive loop, in double precision."""
    window, branches = window_and_branches
    built = sampler(std=0.2, window=window, branches=branches, probability_gate=gate, token_order=order,
                    **options).train()  # fmt: skip
    map_HWD, base = torch.randn(5, 6, D, requires_grad=True), torch.randn(BASE, D, requires_grad=True)
    newline, linear = torch.randn(D), built.selector.linear
    out = built(map_HWD, base, newline)
    weight_ND = torch.randn_like(out.tokens_ND)
    (out.tokens_ND * weight_ND).sum().backward()

    chosen, grid, context = out.branch_ids_M.tolist(), map_HWD.tolist(), base.tolist()
    chooser = selection(built, **options)
    frozen = oracle.probabilities(grid, context, window, chooser)

    def emitted() -> list[oracle.Vector]:
        probs = oracle.probabilities(grid, context, window, chooser)
        return oracle.gated_tokens(
            grid, newline.tolist(), window, branches, chosen, gate=gate, probs=probs, frozen=frozen, order=order
        )

    close(out.tokens_ND, emitted())
    weights = weight_ND.tolist()

    def slope(holder: list[float], index: int, step: float = 1e-5) -> float:
        losses, value = [], holder[index]
        for holder[index] in (value + step, value - step):
            losses.append(sum(oracle.dot(a, b) for a, b in zip(emitted(), weights, strict=True)))
        holder[index] = value
        return (losses[0] - losses[1]) / (2 * step)

    last = len(branches) - 1
    looked_at = [(linear.bias.grad[k], chooser.bias, k) for k in range(len(branches))]
    looked_at += [(linear.weight.grad[k, n], chooser.weight[k], n) for k, n in ((0, 0), (last, 5), (last, 8))]
    looked_at += [(map_HWD.grad[y, x, d], grid[y][x], d) for y, x, d in ((0, 0, 0), (4, 5, 1), (4, 1, 3), (2, 3, 7))]
    if chooser.selector_input == "base_tile":
        looked_at += [(base.grad[n, d], context[n], d) for n, d in ((0, 0), (8, 7))]
    close(
        torch.stack([gradient for gradient, *_ in looked_at]),
        [slope(holder, index) for _, holder, index in looked_at],
        rtol=2e-3,
        atol=2e-4,
    )
    assert linear.bias.grad.abs().sum() > 0


@pytest.mark.parametrize("window_and_branches", oracle.WINDOWS, ids=of_window)
@pytest.mark.parametrize("gate", GATES)
def test_only_the_papers_gate_changes_values(gate, window_and_branches):
    window, branches = window_and_branches
    built = sampler(std=0.2, window=window, branches=branches, probability_gate=gate, selector_input="region")
    inputs = torch.randn(13, 9, D), torch.randn(BASE, D), torch.randn(D)
    served, trained = built.eval()(*inputs), built.train()(*inputs)
    assert served.branch_ids_M.tolist() == trained.branch_ids_M.tolist()
    if gate == "paper":
        assert not torch.allclose(trained.tokens_ND, served.tokens_ND)
    else:
        torch.testing.assert_close(trained.tokens_ND, served.tokens_ND)
    with torch.no_grad():
        assert torch.equal(built(*inputs).tokens_ND, served.tokens_ND)  # a training model that evaluates


@pytest.mark.parametrize("gate", GATES[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_that_leaves_values_alone_does_so_to_the_last_bit(gate, dtype):
    built = sampler(std=0.2, probability_gate=gate, selector_input="region")
    inputs = torch.randn(8, 12, D).to(dtype), torch.randn(BASE, D).to(dtype), torch.randn(D)
    assert torch.equal(built.train()(*inputs).tokens_ND, built.eval()(*inputs).tokens_ND)


def test_a_probability_that_underflows_leaves_gradients_finite():
    for gate in GATES:
        built = sampler(probability_gate=gate, selector_temperature=1e6).train()
        map_HWD = torch.randn(8, 8, D, requires_grad=True)
        out = built(map_HWD, torch.randn(BASE, D), torch.zeros(D))
        assert (out.probs_MK == 0).any()
        out.tokens_ND.sum().backward()
        assert map_HWD.grad.isfinite().all() and built.selector.linear.weight.grad.isfinite().all()


def test_a_fresh_selector_starts_at_full_resolution():
    out = VisionGuidedSampler(D, BASE).eval()(torch.randn(9, 9, D), torch.randn(BASE, D), torch.zeros(D))
    assert out.branch_ids_M.tolist() == [0] * 9 and len(out.tokens_ND) == 81 + 3


def test_a_base_tile_of_another_size_is_refused():
    with pytest.raises(InvalidInput, match=f"base tile: has 4 tokens, the selector expects {BASE}"):
        sampler()(torch.randn(4, 4, D), torch.randn(4, D), torch.zeros(D))


def test_partial_regions_count_real_tokens_only():
    _, real, grid = split_regions(torch.zeros(5, 6, D), 4)
    assert grid == (2, 2)
    assert real.flatten(1).sum(1).tolist() == [16, 8, 4, 2]


@pytest.mark.parametrize("size", [(0, 5), (5, 0)], ids=str)
def test_a_map_without_tokens_gives_none(size):
    out = sampler().eval()(torch.zeros(*size, D), torch.randn(BASE, D), torch.zeros(D))
    assert out.tokens_ND.shape == (0, D) and out.branch_ids_M.shape == (0,)


# The base tile, through the encoder.

SIDE, TILE_PX = 5, 35


def encoder(**options: Any) -> EncoderModel:
    config = FocusLlavaConfig(
        vision=vision_fields(width=8, layers=2, tile_px=TILE_PX, patch_px=TILE_PX // SIDE),
        text=text_fields("llama", hidden=D, layers=2, heads=1, kv_heads=1, context=64),
        image_token_id=3,
        image_grid_pinpoints=grid_pinpoints(TILE_PX),
        text_sampler=TextSamplerConfig(layer=1),
        vision_sampler=VisionSamplerConfig(base_grid=(SIDE, SIDE), **options),
    )
    torch.manual_seed(1)
    model = EncoderModel(config).eval()
    torch.nn.init.normal_(model.vision_guided_sampler.selector.linear.weight, std=2.0)
    torch.nn.init.zeros_(model.vision_guided_sampler.selector.linear.bias)
    return model


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("base_tile", ["keep", "sample", "drop"])
@pytest.mark.parametrize("vision_sampler", [True, False])
@pytest.mark.parametrize("size", [(10, 10), (7, 9), (3, 11)], ids=str)
def test_base_tile_newlines_and_order_equal_the_naive_loop(size, vision_sampler, base_tile, order):
    options = {"selector_input": "region"}
    model = encoder(base_tile=base_tile, token_order=order, **options)
    base_PD, map_HWD = torch.randn(SIDE * SIDE, D), torch.randn(*size, D)
    with torch.no_grad():
        encoded = model.tokens(ProjectedFeatureMap(base_PD=base_PD, map_HWD=map_HWD), vision_sampler)
    newline, base, grid = model.image_newline.tolist(), base_PD.tolist(), map_HWD.tolist()

    def chosen(of: oracle.Grid) -> list[int]:
        chooser = selection(model.vision_guided_sampler, **options)
        return oracle.likeliest(oracle.probabilities(of, base, 4, chooser))

    if not vision_sampler:
        # Every token, a newline after every row; the base tile whole, whatever the option: LLaVA-NeXT.
        expected = base + [token for row in grid for token in (*row, newline)]
        assert encoded.sampled is None
    else:
        assert encoded.sampled is not None
        square = [base[row * SIDE : (row + 1) * SIDE] for row in range(SIDE)]
        first = {
            "keep": lambda: base,
            "sample": lambda: oracle.tokens(square, newline, 4, oracle.PAPER, chosen(square), order),
            "drop": list,
        }[base_tile]()
        expected = first + oracle.tokens(grid, newline, 4, oracle.PAPER, chosen(grid), order)
        assert encoded.map_tokens == len(expected) - len(first) - encoded.sampled.newlines
        assert encoded.sampled.branch_ids_M.tolist() == chosen(grid)
        assert len(set(chosen(grid))) > 1
    close(encoded.tokens_ND, expected, rtol=0, atol=0)
    assert encoded.uncompressed_tokens == SIDE * SIDE + size[0] * (size[1] + 1)
    assert encoded.map_hw == size


@pytest.mark.parametrize("base_tile", ["keep", "sample", "drop"])
def test_an_image_in_a_batch_is_encoded_as_alone(base_tile):
    model = encoder(base_tile=base_tile, similarity="normalized")
    images = [
        ImageTiles(pixels_T3HW=torch.randn(1 + r * c, 3, TILE_PX, TILE_PX), image_size_hw=size, grid_hw=(r, c))
        for r, c, size in ((1, 2, (20, 70)), (2, 2, (50, 41)), (3, 1, (99, 31)))
    ]
    with torch.no_grad():
        together = model(images, [True, False, True])
        alone = [model([image], [on])[0] for image, on in zip(images, (True, False, True), strict=True)]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.tokens_ND, other.tokens_ND, rtol=1e-4, atol=1e-5)
