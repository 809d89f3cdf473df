"""The packed training step against an oracle that runs each conversation alone, with transformers' plain attention."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from services.common.errors import InvalidInput
from services.modeling.loss import IGNORED
from services.modeling.outputs import Counts
from services.modeling.packing import Lengths, pack
from services.modeling.pruning import PruneDraw
from services.sampler.balance import balance_loss
from tests.llm_reference import causal_mask, naive_kept
from tests.tiny_checkpoints import FAMILIES
from tests.unit.modeling.conversations import KINDS, batch, checkpoint, load, sequence

DRAW = PruneDraw(layer=2, thresholds=(0.6, 0.8, 0.5, 0.3, 1.0, 0.6))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(checkpoint(tmp_path_factory.mktemp("model") / "llama"))


def oracle(model, sequences, draw, vision_sampler):
    """Summed loss of the answers, their tokens, and visual tokens kept: one conversation after the other."""
    lm = AutoModelForCausalLM.from_config(model.config.checkpoint.text_config, attn_implementation="eager")
    lm.load_state_dict(model.language_model.state_dict())
    total, tokens, kept_tokens = torch.zeros(()), 0, 0
    for number, each in enumerate(sequences):
        images = iter(model.encoder(each.images, [vision_sampler] * len(each.images)) if each.images else [])
        parts, labels, instruction, visual = [], [], [], []
        for token, label, asks in zip(each.input_ids, each.labels, each.instruction, strict=True):
            if int(token) == model.config.image_token_id:
                tokens_ND = next(images).tokens_ND
                visual += range(len(labels), len(labels) + len(tokens_ND))
                parts.append(tokens_ND)
                labels += [IGNORED] * len(tokens_ND)
                continue
            if asks:
                instruction.append(len(labels))
            parts.append(lm.model.embed_tokens(token[None]))
            labels.append(int(label))
        hidden, position = torch.cat(parts)[None], torch.arange(len(labels))
        target = torch.tensor(labels)
        for index, layer in enumerate(lm.model.layers):
            if draw and index == draw.layer and visual and instruction:
                rotary = lm.model.rotary_emb(hidden, position[None])
                with torch.no_grad():
                    kept = naive_kept(layer, hidden[0], rotary, instruction, visual, draw.thresholds[number])
                left = {p for i, p in enumerate(visual) if i not in kept}
                stay = [p for p in range(len(position)) if p not in left]
                hidden, position, target = hidden[:, stay], position[stay], target[stay]
                visual = [v for v in visual if v not in left]
            rotary = lm.model.rotary_emb(hidden, position[None])
            hidden = layer(hidden, attention_mask=causal_mask(len(position)), position_embeddings=rotary)
        logits = lm.lm_head(lm.model.norm(hidden))[0]
        if (target[1:] != IGNORED).any():
            total = total + nn.functional.cross_entropy(logits[:-1], target[1:], reduction="sum")
        tokens += int((target[1:] != IGNORED).sum())
        kept_tokens += len(visual)
    return total, tokens, kept_tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("draw", [None, DRAW], ids=["whole", "pruned"])
def test_a_packed_batch_is_its_conversations_alone(tmp_path, family, draw):
    model = load(checkpoint(tmp_path / family, family))
    sequences = batch(model.config.checkpoint)
    loss, metrics = model.training_step(sequences, draw=draw, vision_sampler=True)
    expected, tokens, kept = oracle(model, sequences, draw, True)
    assert (metrics["answer_tokens"], metrics["kept_tokens"]) == (tokens, kept) == (4 * 9, kept)
    assert (kept < metrics["visual_tokens"]) == (draw is not None)
    torch.testing.assert_close(loss, expected / tokens, rtol=1e-5, atol=0)


def test_no_sampler_no_pruning_is_the_plain_model(model):
    sequences = batch(model.config.checkpoint)
    loss, metrics = model.training_step(sequences, draw=None, vision_sampler=False)
    expected, tokens, _ = oracle(model, sequences, None, False)
    assert metrics["visual_tokens"] == metrics["uncompressed_tokens"]
    torch.testing.assert_close(loss, expected / tokens, rtol=1e-5, atol=0)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_four_micro_batches_are_one_of_four_times_the_size(model):
    """With the counts of the global batch, loss and gradients add up, the balance loss included."""
    sequences = batch(model.config.checkpoint, (*KINDS[:4], *KINDS[:4]))
    parts = [sequences[i : i + 2] for i in range(0, 8, 2)]
    thresholds = (0.6, 0.8, 0.5, 0.3, 0.9, 0.6, 0.7, 0.4)
    counts = [model.count(part) for part in parts]
    whole: Counts = model.count(sequences)
    branch_counts = sum(count.branch_counts for count in counts)
    assert torch.equal(branch_counts, whole.branch_counts) and branch_counts.min() > 0
    given = {
        "answer_tokens": sum(count.answer_tokens for count in counts),
        "branch_counts": branch_counts,
        "regions": sum(count.regions for count in counts),
        "balance_weight": 0.5,
        "vision_sampler": True,
    }
    model.train()
    loss, metrics = model.training_step(
        sequences, draw=PruneDraw(layer=2, thresholds=thresholds), vision_sampler=True, balance_weight=0.5
    )
    loss.backward()
    expected, total = gradients(model), 0.0
    for number, part in enumerate(parts):
        draw = PruneDraw(layer=2, thresholds=thresholds[2 * number : 2 * number + 2])
        one, _ = model.training_step(part, draw=draw, **given)
        one.backward()
        total += one.item()
    model.eval()
    assert total == pytest.approx(loss.item(), rel=1e-5)
    for name, gradient in gradients(model).items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5 * scale + 1e-9, msg=name)
    assert metrics["balance_loss"] > 0


def test_the_balance_loss_of_a_whole_batch_is_the_papers(model):
    sequences = batch(model.config.checkpoint)
    loss, metrics = model.training_step(sequences, draw=None, vision_sampler=True, balance_weight=0.5)
    images = [image for each in sequences for image in each.images]
    with torch.no_grad():
        probs = torch.cat([e.sampled.probs_MK for e in model.encoder(images, [True] * len(images))])
    expected = balance_loss(probs, model.config.checkpoint.vision_sampler.balance_coefficients).item()
    assert metrics["balance_loss"] == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(metrics["answer_loss"] + 0.5 * expected, rel=1e-5)


def test_the_selector_called_once_for_all_images_chooses_as_one_by_one(model):
    """The way that ZeRO-3 takes, where ranks may not differ in how often they call a layer."""
    images = [image for each in batch(model.config.checkpoint) for image in each.images]
    with torch.no_grad():
        expected = model.encoder(images, [True] * len(images))
        maps = model.encoder.project(images)
        logits = model.encoder.vision_guided_sampler.logits_of([(each.map_HWD, each.base_PD) for each in maps])
        found = [model.encoder.tokens(each, True, logits_MK=own) for each, own in zip(maps, logits, strict=True)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.sampled.logits_MK, other.sampled.logits_MK, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.tokens_ND, other.tokens_ND)


@pytest.mark.parametrize("vision_sampler", [True, False])
def test_text_alone_gives_the_encoder_gradients_of_zero(model, vision_sampler):
    """ZeRO waits on every rank for the gradient of every parameter that trains."""
    model.train()
    sequences = [sequence(model.config.checkpoint, "tuata", seed=1), sequence(model.config.checkpoint, "t", seed=2)]
    loss, metrics = model.training_step(
        sequences, draw=PruneDraw(layer=1, thresholds=(0.5, 0.5)), vision_sampler=vision_sampler
    )
    loss.backward()
    found = gradients(model)
    model.eval()
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    moved = {name.split(".")[0] for name, gradient in found.items() if gradient.any()}
    assert moved == {"language_model"} and metrics["visual_tokens"] == 0
    assert loss.item() == pytest.approx(oracle(model, sequences, None, True)[0].item() / 8, rel=1e-5)


def test_a_batch_without_answers_has_a_loss_of_zero_and_all_gradients(model):
    model.train()
    loss, metrics = model.training_step(batch(model.config.checkpoint, ("tit",)), draw=None, vision_sampler=True)
    loss.backward()
    found = gradients(model)
    model.eval()
    assert loss.item() == 0 and metrics["answer_tokens"] == 0
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


def test_checkpointing_recomputes_tower_and_decoder_and_changes_nothing(model):
    sequences, calls = batch(model.config.checkpoint), []
    layers = [model.encoder.vision_tower.encoder.layers[0], model.language_model.model.layers[3]]
    hooks = [layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1)) for layer in layers]
    losses, found = [], []
    model.train()
    for name in ("", "activation_checkpointing", "gradient_checkpointing"):
        if checkpointing := bool(name):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                getattr(model, f"{name}_enable")()
        calls.clear()
        loss, _ = model.training_step(sequences, draw=DRAW, vision_sampler=True)
        loss.backward()
        losses.append(loss.item())
        found.append(gradients(model))
        assert len(calls) == (4 if checkpointing else 2)
        if checkpointing:
            getattr(model, f"{name}_disable")()
            assert not model.is_gradient_checkpointing
    model.eval()
    for hook in hooks:
        hook.remove()
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    for name in found[0]:
        for other in found[1:]:
            torch.testing.assert_close(found[0][name], other[name], rtol=1e-4, atol=1e-7)


def test_every_tensor_of_a_step_is_made_on_the_weights_device(model):
    """With another default device, whatever is made without naming one lands there, and cannot be mixed in."""
    sequences = batch(model.config.checkpoint)
    model.train()
    with torch.device("meta"):
        loss, _ = model.training_step(sequences, draw=DRAW, vision_sampler=True, balance_weight=0.1)
        text, _ = model.training_step(sequences[2:3], draw=None, vision_sampler=True)
        assert model.count(sequences).regions > 0
    model.eval()
    assert loss.device.type == text.device.type == "cpu" and loss.item() > 0


def test_kept_tokens_keep_their_positions_and_labels_follow_what_is_left(model):
    each = sequence(model.config.checkpoint, "tiua")
    packed = pack([each], [6], image_token_id=model.config.image_token_id, device=torch.device("cpu"))
    stays = torch.ones(len(packed.ids_S), dtype=torch.bool)
    stays[[2, 4, 7]] = False  # the last is the image's last
    left = packed.take([stays.nonzero()[:, 0]])
    assert left.position_S.tolist() == [0, 1, 3, 5, 6, *range(8, 17)] and left.lengths == (Lengths(0, (14,)),)
    answer = each.labels[-4:].tolist()
    assert left.target_S().tolist() == [IGNORED] * 9 + [*answer, IGNORED]


@pytest.mark.parametrize(
    ("kinds", "draw", "field"),
    [
        ((), None, "sequences"),
        (("tiua",), PruneDraw(layer=4, thresholds=(0.5,)), "draw.layer"),
        (("tiua",), PruneDraw(layer=2, thresholds=(0.5, 0.5)), "thresholds"),
    ],
)
def test_what_does_not_fit_is_refused(model, kinds, draw, field):
    with pytest.raises(InvalidInput) as error:
        model.training_step(batch(model.config.checkpoint, kinds), draw=draw, vision_sampler=True)
    assert error.value.field == field
