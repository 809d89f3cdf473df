"""A selector held to a share of the map, batch by batch, in the training model and on real posters."""

import random

import pytest
import torch

from services.checkpoint.store import load_stage
from services.common.errors import InvalidInput
from services.encoder.model import EncoderModel
from tests.tiny_training import tiny_run
from training.config import OptimizerConfig
from training.question_stage import QuestionTask

SHARE, AFTER = 0.5, 4
REGION = 16
"""Tokens of a whole region."""


def task_of(folder, **hold):
    torch.manual_seed(5)
    stage = {"data": "posters", "prune": None, "hold": hold or None, "loss": {"balance": 0.5}}
    task = QuestionTask(tiny_run(str(folder / "out"), stage=stage))
    # A selector that tells regions apart, for one at its start sends all to the same branch.
    torch.nn.init.normal_(task.module.model.encoder.vision_guided_sampler.selector.linear.weight)
    return task


def share_of(encoded):
    cells = sum(image.map_hw[0] * image.map_hw[1] for image in encoded)
    return sum(image.map_tokens for image in encoded) / cells, REGION / cells


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_batch_leaves_the_share_and_no_more(tmp_path, share):
    module = (task := task_of(tmp_path, share=share)).module
    for first in (0, 3):
        samples = [task.data.sample(index) for index in range(first, first + 3)]
        left, region = share_of(module.encode(samples, random.Random(0), share=share))
        assert share - 2 * region < left <= share
    assert share_of(module.encode(samples, random.Random(0)))[0] != left, "by itself the selector leaves another share"


def test_where_partial_regions_leave_more_than_the_share_all_are_at_the_coarsest(tmp_path):
    module = (task := task_of(tmp_path, share=REGION**-1)).module
    samples = [task.data.sample(index) for index in range(3)]
    encoded = module.encode(samples, random.Random(0), share=task.stage.hold.share)
    assert all((image.sampled.branch_ids_M == 2).all() for image in encoded)
    task.export(tmp_path / "made")
    assert all((image.sampled.branch_ids_M == 2).all() for image in module.encode(samples, random.Random(0)))


def test_it_is_held_from_its_step_on_without_the_balance_loss(tmp_path):
    module, batch = (task := task_of(tmp_path, share=SHARE, after=AFTER)).module.train(), task.batch(0, 0, 1)
    with torch.no_grad():
        before, free = module(batch, AFTER - 1)
        after, held = module(batch, AFTER)
    assert before.item() == pytest.approx(free["language"] + 0.5 * free["balance"], rel=1e-4)
    assert after.item() == pytest.approx(held["language"], rel=1e-4)
    assert held["sampled_share"] != free["sampled_share"]


def test_the_share_may_fall_to_it_step_by_step(tmp_path):
    task = task_of(tmp_path, share=SHARE, after=AFTER + 1, falls_from=1)
    module, batch = task.module.train(), task.batch(0, 0, 1)
    with torch.no_grad():
        runs = [module(batch, step) for step in range(AFTER + 3)]
    balanced = [loss.item() > metrics["language"] * 1.01 for loss, metrics in runs]
    assert balanced == [True] + [False] * (AFTER + 2)
    shares = [metrics["sampled_share"] for _, metrics in runs][1:]
    assert shares[0] > 0.95 and shares[AFTER] == shares[AFTER + 1], "newlines of rows of regions are fewer"
    falls = [before - after for before, after in zip(shares[:AFTER], shares[1 : AFTER + 1], strict=True)]
    assert min(falls) > 0.5 * max(falls) > 0, "a batch meets its share only nearly"


@pytest.mark.parametrize("selector_steps", [0, AFTER])
def test_the_task_goes_on_teaching_it_unless_it_rests(tmp_path, selector_steps):
    """A selector at rest has a gradient, for ZeRO, and a learning rate of zero."""
    module, batch = (task := task_of(tmp_path, share=SHARE, after=AFTER)).module.train(), task.batch(0, 0, 1)
    module.optimizer = OptimizerConfig(selector_steps=selector_steps)
    module(batch, AFTER)[0].backward()
    assert module.model.encoder.vision_guided_sampler.selector.linear.weight.grad.abs().sum() > 0


def test_regions_keep_their_order_and_chances_are_moved_alike(tmp_path):
    module = (task := task_of(tmp_path, share=SHARE)).module
    samples = [task.data.sample(index) for index in range(3)]
    with torch.no_grad():
        free, held = (module.encode(samples, random.Random(0), share=share) for share in (None, SHARE))
    log_MK = [torch.cat([image.sampled.probs_MK for image in images]).log() for images in (free, held)]
    # All regions' log-odds between neighbouring branches, two halvings of each side apart, have moved by one number.
    moved = [(log[:, k] - log[:, k + 1]) for k in (0, 1) for log in log_MK]
    finer_M = torch.cat((moved[1] - moved[0], moved[3] - moved[2]))
    torch.testing.assert_close(finer_M, finer_M[:1].expand_as(finer_M), rtol=1e-3, atol=1e-3)


def test_an_export_is_set_to_the_share(tmp_path):
    task = task_of(tmp_path, share=SHARE)
    task.export(tmp_path / "made")
    encoder = EncoderModel(task.config)
    encoder.load_state_dict(load_stage(tmp_path / "made", "encoder"))
    images = [task.data.sample(1000 + index).image for index in range(40)]
    with torch.no_grad():
        left = share_of(encoder(images, [True] * len(images)))[0]
    assert left == pytest.approx(SHARE, abs=0.05), "other images of the same kind"


def test_nothing_is_held_without_the_setting(tmp_path):
    task = task_of(tmp_path)
    before = task.module.model.encoder.vision_guided_sampler.selector.linear.bias.clone()
    task.export(tmp_path / "made")
    stored = load_stage(tmp_path / "made", "encoder")["vision_guided_sampler.selector.linear.bias"]
    assert task.stage.hold is None and torch.equal(stored, before)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"hold": {"share": 0}}, r"stage\.hold\.share: is 0, expected \(0, 1\]"),
        ({"hold": {"share": 0.06}}, r"stage\.hold\.share: is 0\.06, expected \[0\.0625, 1\]"),
        ({"hold": {"share": 1.5}}, r"stage\.hold\.share: is 1\.5"),
        ({"hold": {"share": float("nan")}}, r"stage\.hold\.share: is nan"),
        ({"hold": {"after": 3}}, r"stage\.hold\.share: is missing"),
        (
            {"hold": {"share": 0.5, "after": 3, "falls_from": 3}},
            r"stage\.hold\.falls_from: is 3, expected a step before after",
        ),
        ({"hold": {"share": 0.5, "after": -1}}, r"stage\.hold\.after: is -1"),
        ({"hold": {"share": 0.5}, "vision_sampler": False}, "set vision_sampler: true"),
    ],
)
def test_mistakes_are_named(tmp_path, stage, message):
    with pytest.raises(InvalidInput, match=message):
        QuestionTask(tiny_run(str(tmp_path), stage=stage))
