"""The plan's memory is what a training step takes: weights, gradients, optimizer states, the most of activations."""

import pytest
import torch

from benchmarks.live_memory import LiveMemory
from services.modeling.pruning import PruneDraw
from tests.sequence_model import conversation, measured_workload, small_config, small_model
from training.plan.memory import activations, buffers, on_host, states
from training.plan.parameters import PARTS, Lora, Parameters, Trained, lora_elements
from training.plan.workload import image_workload

SAMPLES, WORDS, ANSWERS = 2, 150, 80
TRAINED = {
    "all": Trained(),
    "projector": Trained(vision_tower=False, selector=False, language_model=False),
    "no tower": Trained(vision_tower=False),
}


def _freeze(model, trained):
    frozen = {
        "vision_tower": model.encoder.vision_tower,
        "selector": model.encoder.vision_guided_sampler,
        "language_model": model.language_model,
    }
    for name, module in frozen.items():
        if not getattr(trained, name):
            module.requires_grad_(False)


def _storages(tensors):
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _measure(model, config, *, draw, vision_sampler):
    """(bytes left by the forward pass, most bytes of the step, metrics) beside weights and gradients."""
    sequences = [conversation(config, words=WORDS, answers=ANSWERS) for _ in range(SAMPLES)]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.grad = torch.zeros_like(parameter)
    known = [*model.parameters(), *model.buffers(), *(parameter.grad for parameter in learning)]
    known += [image.pixels_T3HW for sequence in sequences for image in sequence.images]
    with LiveMemory(known) as memory:
        loss, metrics = model.training_step(sequences, draw=draw, vision_sampler=vision_sampler, balance_weight=0.1)
        left = memory.live
        loss.backward()
    return left, memory.peak, metrics


@pytest.mark.parametrize(
    ("dtype", "checkpointing", "who", "vision_sampler", "pruned"),
    [
        ("float32", False, "all", False, False),
        ("float32", True, "all", True, True),
        ("bfloat16", False, "all", True, True),
        ("bfloat16", True, "all", True, False),
        ("bfloat16", True, "no tower", False, True),
        ("bfloat16", False, "projector", False, False),
        ("bfloat16", True, "projector", False, False),
    ],
)
def test_activations_are_those_that_a_step_keeps(dtype, checkpointing, who, vision_sampler, pruned):
    config, trained, dtype = small_config(), TRAINED[who], getattr(torch, dtype)
    if not vision_sampler:
        trained = Trained(**{part: getattr(trained, part) for part in PARTS} | {"selector": False})
    model = small_model(config, dtype)
    _freeze(model, trained)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    draw = PruneDraw(layer=2, thresholds=(0.5,) * SAMPLES) if pruned else None
    left, most, metrics = _measure(model, config, draw=draw, vision_sampler=vision_sampler)
    work = measured_workload(config, metrics, text_tokens=WORDS, answer_tokens=ANSWERS)
    assert work.map_tokens * SAMPLES == metrics["uncompressed_tokens"]
    kept, working = activations(
        config, trained, work, samples=SAMPLES, checkpointing=checkpointing, itemsize=dtype.itemsize, fused=False
    )
    assert kept == pytest.approx(left, rel=0.15)
    assert kept + working == pytest.approx(most, rel=0.15)


def test_states_are_those_of_weights_gradients_and_adamw():
    config = small_config()
    model = small_model(config)
    model.language_model.requires_grad_(False)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-3)
    for parameter in learning:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [state for each in optimizer.state.values() for state in each.values() if state.ndim]
    total = sum(parameter.numel() for parameter in model.parameters())
    counted = Parameters(total={"all": total}, trained={"all": sum(parameter.numel() for parameter in learning)})
    planned = states(counted, zero=2, devices=1, itemsize=4)
    assert planned == {
        "weights": _storages(model.parameters()),
        "gradients": _storages(parameter.grad for parameter in learning),
        "optimizer": _storages(moments),
        "at_step": 0,
    }


def test_zero_shards_what_its_stage_says():
    parameters = Parameters(total={"all": 800}, trained={"all": 400})
    sizes = [states(parameters, zero=zero, devices=4) for zero in (0, 1, 2, 3)]
    assert [size["weights"] for size in sizes] == [1600, 1600, 1600, 400]
    assert [size["gradients"] for size in sizes] == [800, 800, 200, 200]
    assert [size["optimizer"] for size in sizes] == [4800, 1200, 1200, 1200]
    assert [size["at_step"] for size in sizes] == [1600, 400, 400, 400]
    assert states(parameters, zero=3, devices=4, offload="all")["weights"] == 0
    assert states(parameters, zero=3, devices=4, offload="optimizer")["optimizer"] == 0
    assert on_host(parameters, zero=3) == 0
    assert on_host(parameters, zero=2, offload="all") == on_host(parameters, zero=3, offload="optimizer") == 400 * 18
    assert on_host(parameters, zero=3, offload="all") == 400 * 18 + 800 * 2
    assert buffers(parameters, zero=2, devices=1) < buffers(parameters, zero=2, devices=2)


def test_adapters_keep_what_they_read():
    """Measured on PEFT's own formula: a low-rank product beside each frozen layer."""
    config, targets = small_config(), ("q_proj", "v_proj", "down_proj")
    lora, rank = Lora(rank=4, targets=targets), 4
    model = small_model(config)
    model.encoder.requires_grad_(False)
    model.encoder.multi_modal_projector.requires_grad_(True)
    model.language_model.requires_grad_(False)
    adapters = []

    def adapt(linear):
        down = torch.nn.Linear(linear.in_features, rank, bias=False)
        up = torch.nn.Linear(rank, linear.out_features, bias=False)
        adapters.extend((*down.parameters(), *up.parameters()))
        linear.register_forward_hook(lambda _, inputs, output: output + up(down(inputs[0])))

    for layer in model.language_model.model.layers:
        for name in targets:
            adapt(layer.mlp.down_proj if name == "down_proj" else getattr(layer.self_attn, name))
    assert sum(parameter.numel() for parameter in adapters) == lora_elements(config, lora)
    left, most, _ = _measure(model, config, draw=None, vision_sampler=False)
    trained = Trained(vision_tower=False, selector=False, language_model=False, lora=lora)
    work = image_workload(config, text_tokens=WORDS, answer_tokens=ANSWERS)
    kept, working = activations(config, trained, work, samples=SAMPLES, checkpointing=False, itemsize=4, fused=False)
    assert kept == pytest.approx(left, rel=0.15)
    assert kept + working == pytest.approx(most, rel=0.15)
