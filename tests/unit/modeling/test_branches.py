"""Branches of a shared prefix are the conversations that they would be alone, whatever they are packed with."""

from __future__ import annotations

import pytest
import torch

from services.common.errors import InvalidInput
from services.modeling.attention import PackedRows
from services.modeling.loss import IGNORED
from services.modeling.packing import Lengths, TrainedSequence, answers_in, pack
from services.modeling.pruning import PruneDraw
from tests.unit.modeling.conversations import alone, branched, checkpoint, load, sequence

IMAGE = 255
THRESHOLDS = (0.3, 0.6, 0.9, 1.0, 0.5, 0.7, 0.4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = load(checkpoint(tmp_path_factory.mktemp("model") / "llama"))
    torch.manual_seed(2)
    torch.nn.init.normal_(model.encoder.vision_guided_sampler.selector.linear.weight)
    return model.train()


def batch(config):
    """Prefixes with an image, with two and words of the user's, and with none; branches of all lengths, one that asks
    nothing, one with an image of its own; and a conversation among them."""
    return [
        branched(config, "ti", "uta", "uuuta", "ta", seed=0),
        sequence(config, "tiuta", seed=9, first_image=2),
        branched(config, "tiui", "utaa", "iuta", seed=4),
        branched(config, "t", "uta", seed=6),
    ]


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("vision_sampler", [False, True])
@pytest.mark.parametrize("layer", [None, 1, 3])
def test_a_packed_batch_is_its_branches_alone(model, layer, vision_sampler):
    config = model.config.checkpoint
    sequences = batch(config)
    split = [each for one in sequences for each in (alone(config, one) if one.branches else [one])]
    draw = PruneDraw(layer=layer, thresholds=THRESHOLDS) if layer else None
    loss, metrics = model.training_step(sequences, draw=draw, vision_sampler=vision_sampler)
    loss.backward()
    found = gradients(model)
    expected, of_split = model.training_step(split, draw=draw, vision_sampler=vision_sampler)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    names = {
        "answer_tokens",
        "exact",
        *(name for name in metrics if name.startswith("kept_") and name != "kept_tokens"),
    }
    assert {name: metrics[name] for name in names} == pytest.approx({name: of_split[name] for name in names})
    assert answers_in(sequences) == answers_in(split) == metrics["answer_tokens"]
    assert metrics["visual_tokens"] < of_split["visual_tokens"], "the prefix goes through the lower layers once"
    for name, gradient in gradients(model).items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)


def test_every_branch_keeps_what_it_would_keep_alone(model):
    config, draw = model.config.checkpoint, PruneDraw(layer=2, thresholds=(0.3, 0.6, 0.9))
    one = branched(config, "ti", "uta", "uuuta", "uta")
    with torch.no_grad():
        packed = model.run([one], vision_sampler=True, cut=draw).packed
        each = model.run(alone(config, one), vision_sampler=True, cut=draw).packed
    assert packed.lengths == each.lengths and torch.equal(packed.position_S, each.position_S)
    assert len(set(packed.visual_counts())) == 3


def test_a_branch_continues_where_its_prefix_ends():
    ids = torch.tensor([1, IMAGE, 5, 6, 7, 8, 9, 1, 2])
    labels = ids.masked_fill(torch.arange(9) < 2, IGNORED)
    branches = TrainedSequence(
        input_ids=ids[:7], labels=labels[:7], instruction=ids[:7] > 6, images=(None,), branches=(2, 3)
    )  # type: ignore[arg-type]
    plain = TrainedSequence(input_ids=ids[7:], labels=ids[7:], instruction=ids[7:] > 6)
    packed = pack([branches, plain], [3], image_token_id=IMAGE, device=torch.device("cpu"))
    assert packed.lengths == (Lengths(4, (2, 3)), Lengths(0, (2,)))
    assert packed.position_S.tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6, 0, 1]
    assert packed.label_S.tolist() == [IGNORED] * 5 + [6, IGNORED, 8, 9, IGNORED, 2]
    assert packed.branch_S().tolist() == [-1] * 4 + [0, 0, 1, 1, 1, 2, 2]
    assert [rows.tolist() for rows in packed.rows()] == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6, 7, 8], [9, 10]]
    assert packed.visual_counts() == [3, 3, 0] and packed.branches == 3
    rows = PackedRows(packed.lengths)
    mask = rows.mask(0, torch.device("cpu")).int().tolist()
    assert mask == [
        [1] * 4 + own for own in ([1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1])
    ]


@pytest.mark.parametrize("branches", [(2, 9), (2, 0, 3)])
def test_branches_that_do_not_fit_are_named(branches):
    ids = torch.arange(7)
    each = TrainedSequence(input_ids=ids, labels=ids, instruction=ids > 9, branches=branches, name="set.json:3")
    with pytest.raises(InvalidInput, match=r"set.json:3: has branches of \(2, .*7 in all"):
        pack([each], [], image_token_id=IMAGE, device=torch.device("cpu"))


def test_labels_in_a_prefix_are_named():
    ids = torch.arange(7)
    each = TrainedSequence(input_ids=ids, labels=ids, instruction=ids > 9, branches=(2,), name="set.json:3")
    with pytest.raises(InvalidInput, match="set.json:3: has labels in the prefix"):
        pack([each], [], image_token_id=IMAGE, device=torch.device("cpu"))
