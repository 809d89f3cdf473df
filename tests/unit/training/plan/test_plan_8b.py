"""The 8B configurations on the meta device: they load, their groups and schedule are the paper's, and their plan."""

import json

import pytest
import torch
from click.testing import CliRunner

from focusllava.sizes import parse_size
from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.supported import check_servable
from services.common.errors import InvalidInput
from services.common.settings import build_settings
from training.config import load
from training.conversation_settings import ConversationStage
from training.optimizer import parameter_groups, part_of, share_of_rate, warmup_steps
from training.plan.command import plan
from training.plan.of_run import CONFIGS, MODELS, find_model, plan_run
from training.plan.parameters import PARTS, meta_model

EIGHT_B = ("llama3-8b-pretrain", "llama3-8b-finetune", "llama3-8b-lora")
A100 = parse_size("80GB")


@pytest.fixture(scope="module")
def model():
    return FocusLlavaConfig.from_dict(json.loads((MODELS / "llama3-8b.json").read_text("utf8")))


def _run(name, *changes):
    return load(CONFIGS / f"{name}.yaml", list(changes))


def _plan(name, model, gpus, *changes, **settings):
    return plan_run(_run(name, *changes), model, gpus=gpus, gpu_memory=A100, **settings)


def test_the_model_is_servable_and_has_the_papers_sizes(model):
    check_servable(model)
    shapes = meta_model(model)
    assert all(parameter.is_meta for parameter in shapes.parameters())
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in shapes.named_parameters():
        counts[part_of(name)] += parameter.numel()
    assert {part: round(count / 1e6) for part, count in counts.items()} == {
        "language_model": 8031, "vision_tower": 304, "projector": 21, "selector": 0}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("llama3-8b-pretrain", {"projector": 1e-3}),
        ("llama3-8b-finetune", {"language_model": 1e-5, "projector": 1e-5, "vision_tower": 2e-6, "selector": 1e-5}),
    ],
)
def test_every_parameter_that_is_trained_is_in_one_group_with_its_own_rate(model, name, rates):
    shapes = meta_model(model)
    groups = parameter_groups(shapes, _run(name))
    held = [id(parameter) for group in groups for parameter in group["params"]]
    learning = {id(parameter) for parameter in shapes.parameters() if parameter.requires_grad}
    assert len(held) == len(set(held)) and set(held) == learning
    parts = {id(parameter): part_of(parameter_name) for parameter_name, parameter in shapes.named_parameters()}
    found = {parts[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
    assert found == pytest.approx(rates)
    assert {group["part"] for group in groups} == set(rates)
    assert not any(group["weight_decay"] for group in groups)
    newline = dict(shapes.named_parameters())["encoder.image_newline"]
    assert id(newline) in held and parts[id(newline)] == "projector"


@pytest.mark.parametrize("name", EIGHT_B)
def test_settings_and_schedule_are_the_papers(model, name):
    run = _run(name)
    stage = build_settings(ConversationStage, run.stage, "stage.")
    stage.check_model(model)
    assert run.global_batch == (256 if name == "llama3-8b-pretrain" else 128) and run.epochs == 1
    assert stage.gradient_checkpointing and stage.max_length == 6144 and run.cluster.dtype == "bfloat16"
    assert run.optimizer.weight_decay == 0 and run.optimizer.floor == 0
    steps = 1000
    assert warmup_steps(run.optimizer, steps) == 30
    shares = [share_of_rate(run.optimizer, step, steps) for step in range(steps + 1)]
    assert shares[0] == 0 and shares[15] == 0.5 and max(shares) == shares[30] == 1
    assert shares[515] == pytest.approx(0.5) and shares[-1] == pytest.approx(0)
    if name == "llama3-8b-pretrain":
        assert stage.template == "plain" and not stage.vision_sampler and stage.prune is None
    else:
        assert stage.vision_sampler and stage.balance == 0.1
        assert stage.prune is not None and (stage.prune.layers, stage.prune.thresholds) == ((8, 24), (0.7, 1.0))


@pytest.mark.parametrize("name", EIGHT_B)
def test_the_plan_fits_what_the_file_says(model, name):
    gpus = _run(name).cluster.workers
    found = _plan(name, model, gpus)
    work = found.longest()
    assert work.longest == found.max_length
    needed = found.memory(work, found.zero, samples=found.micro_batch, checkpointing=found.checkpointing)
    assert needed.total < 0.9 * A100
    # Without checkpointing this micro-batch would not fit: the setting is needed.
    assert found.memory(work, found.zero, samples=found.micro_batch, checkpointing=False).total > A100
    assert found.largest(work, found.zero, checkpointing=True) >= found.micro_batch


def test_shards_and_samplers_take_less(model):
    found = _plan("llama3-8b-finetune", model, 8)
    work = found.longest()
    totals = [found.memory(work, zero, samples=1, checkpointing=True).total for zero in (0, 1, 2, 3)]
    assert totals == sorted(totals, reverse=True) and totals[0] > A100 > totals[2]
    assert found.hours(sampled=True, checkpointing=True) < 0.6 * found.hours(sampled=False, checkpointing=True)
    assert found.hours(sampled=True, checkpointing=False) < found.hours(sampled=True, checkpointing=True)
    host = _plan("llama3-8b-finetune", model, 1, "cluster.zero_stage=3", "cluster.offload=all", "cluster.workers=1")
    assert host.memory(work, 3, samples=1, checkpointing=True).total < A100 < totals[0]


def test_a_product_that_is_not_the_global_batch_is_refused(model):
    with pytest.raises(InvalidInput, match="is 128, expected a multiple of samples_per_worker 4 x workers 3 = 12"):
        _plan("llama3-8b-finetune", model, 3)
    with pytest.raises(InvalidInput, match="stage.max_length: is 9000, expected the model's context 8192"):
        _plan("llama3-8b-finetune", model, 8, "stage.max_length=9000")
    with pytest.raises(InvalidInput, match="max_length: is 2000, expected more than the 2928 visual tokens"):
        _plan("llama3-8b-finetune", model, 8, "stage.max_length=2000").longest()


def test_the_command_prints_the_plan(monkeypatch):
    monkeypatch.chdir(CONFIGS.parents[1])
    arguments = ["--config", "llama3-8b-finetune.yaml", "--gpus", "8", "--gpu-memory", "80GB", "--gpu", "H100"]
    result = CliRunner().invoke(plan, [*arguments, "--samples", "1000000"], catch_exceptions=False)
    lines = result.output.splitlines()
    assert lines[0] == "llama3-8b-finetune: 8 x H100 of 80 GB, global batch 128, 6,144 tokens at most"
    header = next(line for line in lines if "ZeRO-2*" in line)
    assert header.split() == ["ZeRO-0", "ZeRO-1", "ZeRO-2*", "ZeRO-3"]
    for row in ("weights", "gradients", "optimizer", "buffers", "activations, checkpointed", "activations, all kept",
                "backward pass, checkpointed", "most at once, checkpointed", "samplers off",
                "samplers on"):  # fmt: skip
        assert any(line.strip().startswith(row) for line in lines), row
    assert "hours of 1,000,000 samples, 7,812 steps" in lines


def test_a_model_is_found_where_it_is_or_by_its_name(tmp_path, model):
    run = _run("llama3-8b-lora", f"init_from={tmp_path}/llama3-8b-pretrain")
    assert find_model("", run)[0] == model and "is not there" in find_model("", run)[1]
    small = build_settings(FocusLlavaConfig, {"text_sampler": {"threshold": 0.5}}, over=model)
    (tmp_path / "own").mkdir()
    small.save(tmp_path / "own")
    assert find_model(str(tmp_path / "own"), run) == (small, str(tmp_path / "own"))
    with pytest.raises(InvalidInput, match="--model: is '.*nowhere', expected a checkpoint's folder"):
        find_model(str(tmp_path / "nowhere"), run)
    assert torch.device("cpu") == torch.zeros(1).device  # building on the meta device leaves no default behind
