"""The plan's operations are those that torch counts in a step of the model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from services.modeling.pruning import PruneDraw
from tests.sequence_model import conversation, measured_workload, small_config, small_model
from training.plan.operations import hours, sample_operations
from training.plan.parameters import Trained
from training.plan.workload import image_workload

WORDS, ANSWERS = 150, 80
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _attention(query, key, *_, causal=False):
    """The products of queries and keys, and of scores and values, which torch's own counter leaves out on a CPU."""
    batch, heads, rows, width = query
    return 4 * batch * heads * rows * key[2] * width // (1 + causal)


def _forward(query, key, value, dropout=0.0, is_causal=False, **_):
    return _attention(query, key, causal=is_causal)


def _backward(grad, query, key, value, out, logsumexp, dropout, is_causal, **_):
    return 2 * _attention(query, key, causal=is_causal)


COUNTED = {ATTENTION: _forward, ATTENTION_BACKWARD: _backward}
FROZEN = {"vision_tower": "encoder.vision_tower", "language_model": "language_model"}


@pytest.mark.parametrize(
    ("frozen", "checkpointing", "pruned"),
    [((), False, False), ((), True, True), (("vision_tower",), False, False), (tuple(FROZEN), True, False)],
)
def test_operations_are_those_of_a_step(frozen, checkpointing, pruned):
    config = small_config()
    model = small_model(config)
    for part in frozen:
        model.get_submodule(FROZEN[part]).requires_grad_(False)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    draw = PruneDraw(layer=2, thresholds=(0.5,)) if pruned else None
    counter = FlopCounterMode(display=False, custom_mapping=COUNTED)
    with counter:
        loss, metrics = model.training_step(
            [conversation(config, words=WORDS, answers=ANSWERS)], draw=draw, vision_sampler=pruned
        )
        loss.backward()
    trained = Trained(**dict.fromkeys(frozen, False))
    work = measured_workload(config, metrics, text_tokens=WORDS, answer_tokens=ANSWERS)
    planned = sample_operations(config, trained, work, checkpointing=checkpointing)
    assert planned.total == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_hours_follow_from_operations():
    config = small_config()
    work = image_workload(config, text_tokens=10, answer_tokens=5)
    operations = sample_operations(config, Trained(), work, checkpointing=False)
    spent = hours(operations, samples=7200, devices=2, peak=operations.total, utilisation=0.5)
    assert spent == pytest.approx(2.0)
    kept = sample_operations(config, Trained(), work, checkpointing=True)
    assert kept.model == operations.model and kept.total > operations.total


def test_a_layer_is_drawn_as_often_as_any_other():
    config = small_config()
    work = image_workload(config, text_tokens=10, answer_tokens=5, cuts=(1, 4), vision_share=0.5, text_share=0.25)
    assert work.tokens_L(5, 2) == [178, 178, 52, 52, 52]
    assert [tokens.count(52) for tokens in work.draws(5)] == [4, 3, 2, 1]
    assert torch.tensor(work.draws(5)).max() == work.longest == 178
