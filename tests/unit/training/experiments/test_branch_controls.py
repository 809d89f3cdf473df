"""Branch controls do what they say, in the training model and on real posters."""

import random

import pytest
import torch

from services.common.errors import InvalidInput
from tests.tiny_training import tiny_run
from training.data.poster_boxes import content_boxes
from training.data.posters import poster_at
from training.experiments.branch_controls import BranchControl, regions_touched
from training.experiments.task import ExperimentTask

SAMPLER = {"base_grid": [8, 8], "selector_input": "region", "probability_gate": "counterfactual"}


def task_of(folder, balance=0.0, **control):
    torch.manual_seed(5)
    stage = {"data": "posters", "prune": None, "branch_control": control or None, "loss": {"balance": balance}}
    task = ExperimentTask(tiny_run(str(folder), stage=stage))
    encoder = task.module.model.encoder
    linear = encoder.vision_guided_sampler.selector.linear
    # A selector that tells regions apart, and on average likes all branches alike.
    torch.nn.init.normal_(linear.weight)
    with torch.no_grad():
        seen = encoder.seen(encoder.project([task.data.sample(index).image for index in range(4)]))
        linear.bias -= torch.cat([logits_MK for logits_MK, _ in seen]).mean(0)
    return task


def encoded_of(task, images=4, seed=0):
    samples = [task.data.sample(index) for index in range(images)]
    return samples, task.module.encode(samples, random.Random(seed))


def test_random_branches_have_their_shares_and_their_own_draw(tmp_path):
    task = task_of(tmp_path, name="random", shares=[0.14, 0.2, 0.66])
    _, encoded = encoded_of(task, images=24)
    ids = torch.cat([image.sampled.branch_ids_M for image in encoded])
    shares = torch.bincount(ids, minlength=3) / len(ids)
    torch.testing.assert_close(shares, torch.tensor([0.14, 0.2, 0.66]), atol=4 * (0.25 / len(ids)) ** 0.5, rtol=0)
    _, again = encoded_of(task, images=24)
    _, other = encoded_of(task, images=24, seed=1)
    assert torch.equal(ids, torch.cat([image.sampled.branch_ids_M for image in again]))
    assert not torch.equal(ids, torch.cat([image.sampled.branch_ids_M for image in other]))


def test_uniform_branches_are_one_max_pool(tmp_path):
    task = task_of(tmp_path, name="uniform", branch=1)
    for image in encoded_of(task)[1]:
        assert (image.sampled.branch_ids_M == 1).all()
        height, width = image.map_hw
        assert image.map_tokens == -(-height // 2) * -(-width // 2)


def test_the_oracle_keeps_what_holds_a_glyph(tmp_path):
    task = task_of(tmp_path, name="oracle")
    samples, encoded = encoded_of(task)
    for index, (sample, image) in enumerate(zip(samples, encoded, strict=True)):
        poster = poster_at("train", task.run.seed, index)
        assert sample.glyph_boxes == content_boxes(poster)["glyph"]
        grid, (height, width) = image.sampled.region_grid, image.map_hw
        expected = torch.full(grid, 2)
        for row in range(grid[0]):
            for column in range(grid[1]):
                for x0, y0, x1, y1 in sample.glyph_boxes:
                    over = x1 * width > 4 * column and x0 * width < 4 * column + 4
                    if over and y1 * height > 4 * row and y0 * height < 4 * row + 4:
                        expected[row, column] = 0
        assert torch.equal(image.sampled.branch_ids_M, expected.flatten())
        assert 0 < (expected == 0).float().mean() < 1


def test_permuted_branches_keep_their_shares_and_lose_their_places(tmp_path):
    task = task_of(tmp_path, name="no_task_gradient")
    own = encoded_of(task, images=8)[1]
    task.module.branch_control = BranchControl(name="permuted")
    dealt = encoded_of(task, images=8)[1]
    moved = 0
    for before, after in zip(own, dealt, strict=True):
        first, second = before.sampled.branch_ids_M, after.sampled.branch_ids_M
        assert torch.equal(first, before.sampled.probs_MK.argmax(1))
        assert torch.equal(first.bincount(minlength=3), second.bincount(minlength=3))
        moved += int((first != second).sum())
    assert moved


@pytest.mark.parametrize("name", ["no_task_gradient", "random", "oracle", ""])
def test_whether_the_task_reaches_the_selector(tmp_path, name):
    options = {"name": name} if name else {}
    task = task_of(tmp_path, **options, **({"shares": [0.2, 0.3, 0.5]} if name == "random" else {}))
    weight = task.module.model.encoder.vision_guided_sampler.selector.linear.weight
    loss, metrics = task.module.train()(task.batch(0, 0, 1), 0)
    loss.backward()
    # The balance loss weighs nothing here, so what is left is the task's.
    assert bool(weight.grad is not None and weight.grad.abs().sum() > 0) == (name == "")
    assert weight.requires_grad == (name in ("", "no_task_gradient")) and 0 <= metrics["branch_0"] <= 1
    assert task.module.model.encoder.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_the_balance_loss_trains_a_selector_without_task_gradient(tmp_path):
    task = task_of(tmp_path, balance=1.0, name="no_task_gradient")
    task.module.train()(task.batch(0, 0, 1), 0)[0].backward()
    assert task.module.model.encoder.vision_guided_sampler.selector.linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"branch_control": {"name": "lucky"}}, "stage.branch_control.name: is 'lucky', expected one of random"),
        ({"branch_control": {"name": "random", "shares": [0.5, 0.5]}}, "has 2 values for 3 branches"),
        ({"branch_control": {"name": "random"}}, "branch_control.shares"),
        ({"branch_control": {"name": "uniform", "branch": 3}}, "stage.branch_control.branch: is 3"),
        ({"branch_control": {"name": "permuted"}}, "for evaluation"),
        ({"branch_control": {"name": "oracle"}, "vision_sampler": False}, "set vision_sampler: true"),
        ({"hold": {"share": 0.5}, "branch_control": {"name": "oracle"}}, "leave branch_control out"),
        ({"map_rival": {"name": "random"}}, "set vision_sampler: false"),
        ({"map_rival": {"name": "best"}, "vision_sampler": False}, "stage.map_rival: rival: is 'best'"),
        ({"layer_rival": {"name": "fastv", "budget": 0.6}}, "leave prune out"),
        ({"layer_rival": {"name": "fastv", "budget": 0.1}, "prune": None}, "stage.layer_rival: budget: is 0.1"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, stage, message):
    with pytest.raises(InvalidInput, match=message):
        ExperimentTask(tiny_run(str(tmp_path), stage=stage))


def test_a_box_on_a_border_touches_one_side_only():
    grid = regions_touched([(0.5, 0.0, 0.75, 0.5)], (8, 16), 4, (2, 4)).view(2, 4)
    assert grid.tolist() == [[False, False, True, False], [False] * 4]
    assert not regions_touched([], (8, 16), 4, (2, 4)).any()
