"""Every rival of the vision-guided sampler against naive loops: odd maps, all budgets, ties, fp32 and bf16."""

from dataclasses import replace

import pytest
import torch

from services.common.errors import InvalidInput
from tests.unit.training.experiments.rivals.map_oracles import (
    BUDGETS,
    DTYPES,
    KINDS,
    NAIVE,
    SIZES,
    D,
    check,
    image,
    share_of,
)
from training.experiments.rivals.downsample import kernel_within
from training.experiments.rivals.prumerge import PruMergePlus
from training.experiments.rivals.registry import MAP_RIVALS, map_rival


@pytest.mark.parametrize("name", NAIVE)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_naive_loop(name, budget, kind, dtype):
    for size in SIZES:
        given = image(size, dtype, kind)
        check(given, map_rival(name, budget=budget)(given), NAIVE[name](given, budget))


@pytest.mark.parametrize("name", ["prumerge_plus"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_budget_the_image_decides(name, kind):
    counts = set()
    for seed, size in enumerate([*SIZES, *SIZES]):
        given = image(size, kind=kind, seed=seed)
        reduced = map_rival(name, budget=None)(given)
        check(given, reduced, NAIVE[name](given, None))
        counts.add(reduced.content_tokens / (size[0] * size[1]))
    assert len(counts) > 1


def test_prumerge_counts_outliers_by_hand():
    # Quartiles 1 and 1: three of 20 exceed them, and beside those every (20 // 3 // 3)-th is kept.
    attention = torch.tensor([1.0] * 17 + [2.0, 9.0, 8.0])
    assert PruMergePlus(budget=None).select(attention).tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 16, 17, 18, 19]
    assert PruMergePlus(budget=0.1).select(attention).tolist() == [18, 19]
    assert PruMergePlus(budget=0.25).select(attention).tolist() == [0, 8, 17, 18, 19]
    # No patch stands out: the first counts as one.
    assert PruMergePlus(budget=None).select(torch.ones(20)).tolist() == [0, 6, 12, 18]


@pytest.mark.parametrize("newline_rows", [1, 4])
@pytest.mark.parametrize("name", MAP_RIVALS)
def test_newlines_close_the_bands_that_hold_tokens(name, newline_rows):
    for size in SIZES:
        given = image(size)
        reduced = map_rival(name, budget=0.25, newline_rows=newline_rows)(given)
        sources = [s for s in reduced.source_S.tolist() if s >= 0]
        assert sources == sorted(sources)
        if name in NAIVE:
            check(given, reduced, NAIVE[name](given, 0.25), newline_rows)
        bands = {s // size[1] // newline_rows for s in sources}
        assert reduced.newlines == len(bands) and reduced.source_S[-1] == -1
        assert newline_rows == 1 or reduced.newlines <= -(-size[0] // 4)


@pytest.mark.parametrize("name", MAP_RIVALS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_budget_of_one_keeps_the_map_as_the_unsampled_model_lays_it_out(name, dtype):
    for size in SIZES:
        given = image(size, dtype)
        whole = torch.cat((given.map_HWD, given.newline_D.to(dtype).expand(size[0], 1, D)), dim=1).flatten(0, 1)
        assert torch.equal(map_rival(name, budget=1.0)(given).tokens_SD, whole)


@pytest.mark.parametrize("name", ["top_similarity", "random", "visionzip", "prumerge_plus"])
def test_a_budget_is_met_exactly(name):
    for size in SIZES:
        for budget in (0.1, 0.25, 0.37, 0.5):
            reduced = map_rival(name, budget=budget)(image(size))
            assert reduced.content_tokens == share_of(size[0] * size[1], budget)


@pytest.mark.parametrize("name", MAP_RIVALS)
def test_same_input_same_output_and_the_input_is_left_alone(name):
    given, untouched = image((5, 7)), image((5, 7))
    first, second = (map_rival(name, budget=0.3)(given) for _ in range(2))
    assert torch.equal(first.tokens_SD, second.tokens_SD) and torch.equal(first.source_S, second.source_S)
    for field in ("map_HWD", "attention_HW", "key_HWGd"):
        assert torch.equal(getattr(given, field), getattr(untouched, field))


@pytest.mark.parametrize("name", MAP_RIVALS)
def test_gradients_reach_what_came_out_and_the_newline(name):
    given = image((6, 5))
    given = replace(given, map_HWD=given.map_HWD.requires_grad_(), newline_D=given.newline_D.requires_grad_())
    reduced = map_rival(name, budget=0.25)(given)
    reduced.tokens_SD.sum().backward()
    reached = given.map_HWD.grad.flatten(0, 1).abs().sum(1) > 0
    # Means and merges take from every token; a maximum not from the cell's first.
    assert reached.all() == (name in ("uniform_mean", "visionzip"))
    assert name == "uniform_max" or reached[reduced.source_S[reduced.source_S >= 0]].all()
    torch.testing.assert_close(given.newline_D.grad, torch.full((D,), float(reduced.newlines)))


def test_random_tokens_follow_the_image_the_seed_and_nothing_else():
    given = image((12, 12))
    kept = map_rival("random")(given).source_S
    assert torch.equal(kept, map_rival("random")(replace(given, map_HWD=given.map_HWD * 2)).source_S)
    assert not torch.equal(kept, map_rival("random")(replace(given, content_hash="another")).source_S)
    assert not torch.equal(kept, map_rival("random", seed=1)(given).source_S)
    hits = torch.zeros(144)
    for number in range(400):
        source = map_rival("random")(replace(given, content_hash=str(number))).source_S
        hits[source[source >= 0]] += 1
    # 100 expected, standard deviation 8.7: five of them either way.
    assert hits.sum() == 400 * 36 and 57 < hits.min() and hits.max() < 143
    tokens = given.map_HWD.flatten(0, 1)
    reduced = map_rival("random")(given)
    assert torch.equal(reduced.tokens_SD[reduced.source_S >= 0], tokens[kept[kept >= 0]])


def test_partial_cells_take_real_tokens_only():
    given = replace(image((3, 3)), map_HWD=-1 - torch.arange(9.0).view(3, 3, 1).expand(3, 3, D))
    for name, expected in (("uniform_max", [-1, -3, -7, -9]), ("uniform_mean", [-3, -4.5, -7.5, -9])):
        reduced = map_rival(name)(given)
        assert reduced.tokens_SD[reduced.source_S >= 0][:, 0].tolist() == expected


def test_kernels_by_hand():
    by_hand = {1.0: (1, 1), 0.5: (1, 2), 0.39: (2, 2), 0.25: (2, 2), 0.2: (2, 3), 0.1: (3, 4), 1 / 16: (4, 4)}
    assert {budget: kernel_within(budget) for budget in by_hand} == by_hand


def test_cosine_similarity_forgets_length():
    given = image((4, 5))
    scale = torch.rand(4, 5, 1) + 0.5
    scaled = replace(given, map_HWD=given.map_HWD * scale)
    kept = map_rival("top_similarity", similarity="cosine")
    assert torch.equal(kept(given).source_S, kept(scaled).source_S)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("random", "content_hash"),
        ("visionzip", "attention_HW"),
        ("visionzip", "key_HWGd"),
        ("prumerge_plus", "attention_HW"),
        ("prumerge_plus", "key_HWGd"),
    ],
)
def test_what_is_missing_is_named(name, field):
    with pytest.raises(InvalidInput, match=f"{field}: is missing, {name}") as caught:
        map_rival(name)(replace(image((3, 3)), **{field: None}))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        ("nobody", {}, "rival"),
        ("random", {"budget": 0.0}, "budget"),
        ("visionzip", {"budget": 1.5}, "budget"),
        ("uniform_max", {"newline_rows": 0}, "newline_rows"),
        ("visionzip", {"contextual_share": 1.0}, "contextual_share"),
        ("prumerge_plus", {"neighbour_share": 0.0}, "neighbour_share"),
        ("top_similarity", {"similarity": "euclid"}, "similarity"),
    ],
)
def test_options_are_checked(name, options, field):
    with pytest.raises(InvalidInput) as caught:
        map_rival(name, **options)
    assert caught.value.field == field
