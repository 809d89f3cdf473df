"""A training step never mixes devices: every path of the model runs on a pretended GPU, fed from the CPU."""

import pytest
import torch
from torch import nn

from services.common.settings import build_settings
from services.modeling.pruning import PruneDraw, PruneSchedule
from tests.pretended_gpu import GPU, PretendedGpu
from tests.sequence_model import conversation, small_config, small_model
from tests.tiny_training import MODEL, tiny_run
from training.config import RunConfig
from training.conversation_settings import ConversationStage
from training.conversation_stage import ConversationModule
from training.dense_labels import DenseTask
from training.experiments.task import ExperimentTask
from training.global_batch import Totals, to_device


def _sequences(config, kind):
    plain = [conversation(config, words=60, answers=20), conversation(config, words=50, answers=10)]
    return {
        "images": plain,
        "several images": [conversation(config, images=2, words=60, answers=20), plain[0]],
        "some text": [plain[0], conversation(config, images=0, words=40, answers=10)],
        "text alone": [conversation(config, images=0, words=40, answers=10)],
    }[kind]


@pytest.mark.parametrize("kind", ["images", "several images", "some text", "text alone"])
@pytest.mark.parametrize("samplers", [False, True], ids=["off", "on"])
def test_a_training_step_keeps_to_the_gpu(kind, samplers):
    config = small_config()
    model = small_model(config)
    if kind == "some text":
        model.activation_checkpointing_enable({"use_reentrant": False})
    sequences = _sequences(config, kind)
    draw = PruneDraw(layer=2, thresholds=(0.6,) * len(sequences)) if samplers else None
    with PretendedGpu(model) as gpu:
        counts = model.count(sequences, vision_sampler=samplers)
        loss, _ = model.training_step(
            sequences,
            draw=draw,
            vision_sampler=samplers,
            answer_tokens=float(counts.answer_tokens),
            branch_counts=counts.branch_counts,
            regions=max(1.0, float(counts.regions)),
            balance_weight=0.1,
        )
        loss.backward()
        assert loss.device == GPU
        assert all(gpu.has(p.grad) for p in model.parameters() if p.grad is not None)
    assert gpu.faults == []


@pytest.mark.parametrize(
    ("gate", "selector_input", "order"),
    [("paper", "base_tile", "region"), ("straight_through", "region", "row"), ("counterfactual", "base_tile", "row")],
)
def test_every_sampler_keeps_to_the_gpu(gate, selector_input, order):
    sampler = {"probability_gate": gate, "selector_input": selector_input, "token_order": order,
               "similarity": "normalized", "base_tile": "sample", "branches": [[0, 0], [1, 1], [4, 4]]}  # fmt: skip
    config = small_config(vision_sampler=sampler)
    model = small_model(config)
    with PretendedGpu(model) as gpu:
        loss, _ = model.training_step(_sequences(config, "images"), draw=None, vision_sampler=True, balance_weight=0.1)
        loss.backward()
    assert gpu.faults == []


def test_a_step_of_the_trainer_keeps_to_the_gpu():
    """The trainer moves a batch before the step; its counts stay on the CPU."""
    config = small_config()
    stage = ConversationStage(data="unused", prune=PruneSchedule(layers=(2, 3)))
    module = ConversationModule(small_model(config), stage, seed=0)
    with PretendedGpu(module) as gpu:
        place, moved = to_device((0, _sequences(config, "some text")), GPU)
        assert all(gpu.has(sequence.input_ids) for sequence in moved)
        counts = module.count((place, moved), 0)
        loss, _ = module((place, moved), 0, Totals(micro_batches=2, counts=2 * counts))
        loss.backward()
        assert loss.device == GPU
    assert gpu.faults == []


@torch.no_grad()
def test_evaluation_and_generation_keep_to_the_gpu():
    config = small_config()
    model = small_model(config).eval()
    sequence = conversation(config, words=30, answers=5)
    pixels = sequence.images[0].pixels_T3HW[None]
    inputs = {
        "input_ids": sequence.input_ids[None],
        "instruction_mask": sequence.instruction[None],
        "pixel_values": pixels,
        "image_sizes": torch.tensor([sequence.images[0].image_size_hw]),
    }
    with PretendedGpu(model) as gpu:
        inputs = to_device(inputs, GPU)
        model(**inputs)
        first = model(**inputs, use_cache=True)
        model(input_ids=inputs["input_ids"][:, -1:], past_key_values=first.past_key_values)
        model(**inputs, labels=to_device(sequence.labels[None], GPU))
    assert gpu.faults == []


def test_the_pretended_gpu_finds_what_meets():
    layer = nn.Linear(3, 3)
    with PretendedGpu(layer) as gpu:
        there = layer(torch.randn(2, 3, device=layer.weight.device))
        here = torch.arange(3)
        assert (there.device, here.device) == (GPU, torch.device("cpu"))
        there.sum().backward()
        assert gpu.has(layer.weight.grad)
        there = there.detach()
        there[:, here.to(there)[:2].long()] + there.new_tensor([1.0, 2.0]) + torch.zeros_like(there)[:, :2] * 2.0
        nn.functional.one_hot(there.argmax(1), 3) + there
        there * torch.tensor(2.0) + there.cpu().to(GPU)
        here + there.cpu()
        assert gpu.faults == []
        there + here
        there[:, here]
        there.numpy()
        layer(torch.randn(2, 3))
    assert len(gpu.faults) == 4


STAGES = {
    "posters": {"data": "posters"},
    "held share": {"hold": {"share": 0.5}},
    "grounding": {"vision_sampler": False, "prune": None, "grounding": {"weight": 1.0, "layers": [2, 3]}},
    "map rival": {"vision_sampler": False, "map_rival": {"name": "prumerge_plus", "budget": 0.5}},
    "layer rival": {"prune": None, "layer_rival": {"name": "pyramid_drop", "budget": 0.6}},
    "random branches": {"branch_control": {"name": "random", "shares": [1, 1, 1]}},
    "oracle branches": {"branch_control": {"name": "oracle"}},
}


@pytest.mark.parametrize("stage", STAGES.values(), ids=list(STAGES))
def test_a_step_of_one_branch_a_question_keeps_to_the_gpu(stage):
    task = ExperimentTask(tiny_run("unused", stage=stage))
    with PretendedGpu(task.module) as gpu:
        batch = to_device(task.batch(0, 0, 1), GPU)
        task.count(batch, 0)
        task.module(batch, 0)[0].backward()
    assert gpu.faults == []


def test_the_vision_stage_keeps_to_the_gpu():
    raw = {"name": "n", "steps": 1, "samples_per_worker": 2, "output": "unused"}
    stage = {"vision_stem": "conv", "vision": MODEL["vision"]}
    task = DenseTask(build_settings(RunConfig, {**raw, "stage": stage}))
    with PretendedGpu(task.module) as gpu:
        task.module(to_device(task.batch(0, 0, 1), GPU), 0)[0].backward()
    assert gpu.faults == []
