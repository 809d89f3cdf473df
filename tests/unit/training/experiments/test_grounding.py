"""The grounding and reading losses against hand-computed attention; which tokens hold the evidence."""

import math

import pytest
import torch

from services.common.errors import InvalidInput
from services.common.settings import build_settings
from services.common.types import ImageTiles
from services.encoder.model import EncodedImage
from tests.tiny_training import tiny_run
from training import layout
from training.experiments.grounding import Evidence, evidence_tokens, grounding_loss, reading_loss
from training.experiments.task import ExperimentStage, ExperimentTask
from training.layout import Branch, Sample, attention_mask, branched_attention, pack_text, positions

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


def uniform_attention(text, prefix):
    """Every branch token attends evenly to all that it sees."""
    batch, branches, length = text.token_ids_BQT.shape
    visible = attention_mask(torch.full((batch,), prefix), prefix, branches, length)[:, 0].float()
    share = visible / visible.sum(-1, keepdim=True)
    return [share[b].unflatten(0, (branches, length)).unsqueeze(2).expand(-1, -1, 3, -1) for b in range(batch)]


def test_losses_by_hand():
    text = pack_text([sample(branch(2), branch(3))], pad_id=0)
    prefix = WORDS + VISUAL
    attention = uniform_attention(text, prefix)
    # The token at index t of a branch sees the prefix's 7 tokens and t + 1 of its own.
    evidence = [[Evidence(torch.tensor([1, 4]), compares=False), None]]
    last, words = -math.log(2 / 10), [-math.log(2 / 8), -math.log(2 / 9)]
    expected = (last + sum(words) / 2) / 2
    assert grounding_loss(attention, text, evidence).item() == pytest.approx(expected)
    reading = (-math.log(2 / 10) - math.log(3 / 11)) / 2
    assert reading_loss(attention, text, prefix).item() == pytest.approx(reading)


def test_every_token_that_predicts_the_answer_looks():
    text = pack_text([sample(branch(2, answer=(8, 9, 5)), branch(1))], pad_id=0)
    attention = uniform_attention(text, WORDS + VISUAL)
    predicts = [-math.log(2 / seen) for seen in (10, 11, 12)]
    words = [-math.log(2 / 8), -math.log(2 / 9)]
    expected = (sum(predicts) / 3 + sum(words) / 2) / 2
    tokens = torch.tensor([1, 4])
    assert grounding_loss(attention, text, [[Evidence(tokens, compares=False), None]]).item() == pytest.approx(expected)
    # What compares two places has its words alone look.
    expected = sum(words) / 2 / 2
    assert grounding_loss(attention, text, [[Evidence(tokens, compares=True), None]]).item() == pytest.approx(expected)


def test_evidence_is_the_tokens_under_the_box():
    height, width, base = 4, 6, 9
    tokens = torch.zeros(base + height * (width + 1), 8)
    encoded = EncodedImage(tokens_ND=tokens, map_hw=(height, width), uncompressed_tokens=len(tokens), sampled=None)
    box, corner = (0.5, 0.25, 0.6, 0.49), (0.0, 0.0, 0.1, 0.1)
    asked = sample(branch(1, box), branch(1), branch(1, box, corner, asks_place=True), branch(1, box, box))
    inside = evidence_tokens(asked, encoded)
    # Row 1, column 3 of the map, where each row ends with a newline.
    tokens = [where.tokens.tolist() if where else None for where in inside]
    assert tokens[0] == tokens[3] == [base + 1 * (width + 1) + 3] and tokens[1] is None
    # Two things are compared: where they are, only the base tile tells. Rows 0 and 1, column 1 of its 3 x 3.
    assert tokens[2] == [0, 1, 4] and [where.compares for where in inside if where] == [False, True, False]


def test_a_branch_continues_where_its_own_image_ends():
    ids = positions(torch.tensor([4, 7]), 7, 2, 3)
    assert ids[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 4, 5, 6]
    assert ids[1, 7:].tolist() == [7, 8, 9, 7, 8, 9]
    mask = attention_mask(torch.tensor([4, 7]), 7, 2, 3)[:, 0]
    assert mask.shape == (2, 6, 13)
    assert mask[0, 3].tolist() == [True] * 4 + [False] * 3 + [False] * 3 + [True] + [False] * 2
    assert mask[:, range(6), range(7, 13)].all()


def test_branched_attention_is_attention_with_the_whole_mask(monkeypatch):
    monkeypatch.setattr(layout, "BLOCK", 3)
    torch.manual_seed(0)
    prefix, branches, length, heads = 7, 3, 4, 2
    total = prefix + branches * length
    query, key, value = (torch.randn(2, n, total, 8) for n in (2 * heads, heads, heads))
    lens = torch.tensor([5, 7])
    mask = attention_mask(lens, prefix, branches, length)
    got, _ = branched_attention(torch.nn.Identity(), query, key, value, mask, scaling=0.3)
    rows = torch.ones(2, prefix, total, dtype=torch.bool).tril()
    scores = 0.3 * query @ key.repeat_interleave(2, 1).transpose(-1, -2)
    scores = scores.masked_fill(~torch.cat((rows.unsqueeze(1), mask), 2), -torch.inf)
    torch.testing.assert_close(got, (scores.softmax(-1) @ value.repeat_interleave(2, 1)).transpose(1, 2))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"data": "mine.json"}, "stage.grounding: data 'mine.json' does not say where its answers are"),
        ({"prune": {"layers": [1, 2]}}, "stage.grounding: needs all visual tokens"),
        ({"vision_sampler": True}, "stage.grounding: needs all visual tokens"),
        ({"map_rival": {"name": "random"}}, "stage.grounding: needs all visual tokens"),
        ({"grounding": {"weight": 0.6}}, r"stage.grounding.layers: is \(\), expected one or more, or reading_layers"),
        ({"grounding": {"layers": [1]}}, "stage.grounding.weight: is missing"),
    ],
)
def test_a_loss_that_has_nothing_to_look_for_is_refused(stage, message):
    base = {"data": "posters", "vision_sampler": False, "grounding": {"weight": 0.6, "layers": [1]}}
    assert build_settings(ExperimentStage, base, "stage.").grounding.taught_layers == {1}
    with pytest.raises(InvalidInput, match=message):
        build_settings(ExperimentStage, {**base, **stage}, "stage.")


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
    assert metrics["grounding"] > 0 and task.module.language_model.model.layers[1].self_attn.q_proj.weight.grad.any()
