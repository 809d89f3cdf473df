"""The grounding and reading losses against hand-computed attention; which tokens hold the evidence."""

import math
from types import SimpleNamespace

import pytest
import torch

from services.common.errors import InvalidInput
from services.common.settings import build_settings
from services.common.types import ImageTiles
from services.modeling.attention import PackedRows
from services.modeling.packing import Lengths
from tests.tiny_training import tiny_run
from training.data.branches import Branch, Sample
from training.experiments.grounding import Evidence, evidence_tokens, grounding_loss, reading_loss
from training.experiments.task import ExperimentStage, ExperimentTask

WORDS, VISUAL = 2, 5


def branch(words, *evidence, asks_place=False, answer=(8,)):
    """`words` instruction tokens, the prompt's last token, the answer's tokens."""
    return Branch(
        token_ids=(*range(10, 10 + words), 7, *answer),
        labels=(*[-100] * (words + 1), *answer),
        instruction=(*[True] * words, False, *[False] * len(answer)),
        answer_start=words + 1,
        evidence_xyxy=evidence,
        asks_place=asks_place,
    )


def sample(*branches):
    tiles = ImageTiles(pixels_T3HW=torch.zeros(1, 3, 2, 2), image_size_hw=(2, 2), grid_hw=(1, 1))
    return Sample(image=tiles, prefix_ids=tuple(range(WORDS)), branches=branches)


def uniform_attention(sample):
    """Every branch token attends evenly to all that it sees, in each of three heads."""
    sizes = tuple(len(branch.token_ids) for branch in sample.branches)
    visible = PackedRows([Lengths(WORDS + VISUAL, sizes)]).mask(0, torch.device("cpu")).float()
    return (visible / visible.sum(-1, keepdim=True)).unsqueeze(1).expand(-1, 3, -1)


def test_losses_by_hand():
    asked = sample(branch(2), branch(3))
    attention = [uniform_attention(asked)]
    # The token at index t of a branch sees the prefix's 7 tokens and t + 1 of its own.
    evidence = [[Evidence(torch.tensor([1, 4]), compares=False), None]]
    last, words = -math.log(2 / 10), [-math.log(2 / 8), -math.log(2 / 9)]
    expected = (last + sum(words) / 2) / 2
    assert grounding_loss(attention, [asked], evidence).item() == pytest.approx(expected)
    reading = (-math.log(2 / 10) - math.log(3 / 11)) / 2
    assert reading_loss(attention, [asked]).item() == pytest.approx(reading)


def test_every_token_that_predicts_the_answer_looks():
    asked = sample(branch(2, answer=(8, 9, 5)), branch(1))
    attention = [uniform_attention(asked)]
    predicts = [-math.log(2 / seen) for seen in (10, 11, 12)]
    words = [-math.log(2 / 8), -math.log(2 / 9)]
    expected = (sum(predicts) / 3 + sum(words) / 2) / 2
    tokens = torch.tensor([1, 4])
    evidence = [[Evidence(tokens, compares=False), None]]
    assert grounding_loss(attention, [asked], evidence).item() == pytest.approx(expected)
    # What compares two places has its words alone look.
    evidence = [[Evidence(tokens, compares=True), None]]
    assert grounding_loss(attention, [asked], evidence).item() == pytest.approx(sum(words) / 2 / 2)
    assert grounding_loss(attention, [asked], [[None, None]]).item() == 0


def test_evidence_is_the_tokens_under_the_box():
    """The map is 4 x 6 tokens, what the image fills of 6 x 6; a base tile of 6 x 6 comes before it."""
    image = ImageTiles(pixels_T3HW=torch.zeros(2, 3, 6, 6), image_size_hw=(40, 60), grid_hw=(1, 1))
    box, corner = (0.5, 0.25, 0.6, 0.49), (0.0, 0.0, 0.1, 0.1)
    branches = branch(1, box), branch(1), branch(1, box, corner, asks_place=True), branch(1, box, box)
    asked = Sample(image=image, prefix_ids=tuple(range(WORDS)), branches=branches)
    inside = evidence_tokens(asked, SimpleNamespace(patches_per_side=6))
    # Row 1, column 3 of the map, where each row ends with a newline.
    tokens = [where.tokens.tolist() if where else None for where in inside]
    assert tokens[0] == tokens[3] == [36 + 1 * 7 + 3] and tokens[1] is None
    # Two things are compared: where they are, only the base tile tells. Rows 1 and 2, column 3; and its corner.
    assert tokens[2] == [0, 9, 15] and [where.compares for where in inside if where] == [False, True, False]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"data": "easy_vqa"}, "stage.grounding: data 'easy_vqa' does not say where its answers are"),
        ({"prune": {"layers": [1, 2]}}, "stage.grounding: needs all visual tokens"),
        ({"vision_sampler": True}, "stage.grounding: needs all visual tokens"),
        ({"map_rival": {"name": "random"}}, "stage.grounding: needs all visual tokens"),
        ({"grounding": {"weight": 0.6}}, r"stage.grounding.layers: is \(\), expected one or more, or reading_layers"),
        ({"grounding": {"layers": [1]}}, "stage.grounding.weight: is missing"),
    ],
)
def test_a_loss_that_has_nothing_to_look_for_is_refused(stage, message):
    base = {"data": "posters", "vision_sampler": False, "grounding": {"weight": 0.6, "layers": [1]}}
    assert build_settings(ExperimentStage, base, "stage.").grounding.taught_layers == [1]
    with pytest.raises(InvalidInput, match=message):
        build_settings(ExperimentStage, {**base, **stage}, "stage.")


def test_a_layer_that_there_is_not_is_refused(tmp_path):
    stage = {"vision_sampler": False, "prune": None, "grounding": {"weight": 0.5, "layers": [4]}}
    with pytest.raises(InvalidInput, match=r"stage.grounding.layers: is \[4\], expected each in 0..3"):
        ExperimentTask(tiny_run(str(tmp_path), stage=stage))


def test_the_loss_joins_the_language_loss(tmp_path):
    stage = {"vision_sampler": False, "prune": None}
    lesson = {"weight": 0.5, "layers": [2], "reading_layers": [1]}
    losses = {}
    for name, changes in (("plain", {}), ("taught", {"grounding": lesson})):
        torch.manual_seed(0)
        task = ExperimentTask(tiny_run(str(tmp_path), stage={**stage, **changes}))
        losses[name], metrics = task.module(task.batch(0, 0, 1), 0)
    assert losses["taught"].item() == pytest.approx(losses["plain"].item() + 0.5 * metrics["grounding"], rel=1e-5)
    losses["taught"].backward()
    assert (
        metrics["grounding"] > 0 and task.module.model.language_model.model.layers[1].self_attn.q_proj.weight.grad.any()
    )
