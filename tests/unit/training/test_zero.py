"""ZeRO 3, with its weights in the host's memory too, takes the steps that ZeRO 2 takes, on two workers: in float32, in
bfloat16, and resumed. Its export holds one whole weight at a time."""

import dataclasses
import json

import pytest
import torch

import training.conversation_stage
import training.trainer
from services.checkpoint.store import load_stage
from services.common.settings import build_settings
from tests.conversation_data import make_conversations
from tests.without_ray import start_worker, train_without_ray
from training.checkpoints import name_of
from training.config import RunConfig
from training.optimizer import deepspeed_config
from training.whole_weights import exported_tensors

TASK = ("training.conversation_stage", "ConversationTask")
KINDS = {
    "two": {"zero_stage": 2},
    "three": {"zero_stage": 3},
    "offloaded": {"zero_stage": 3, "offload": "all"},
    "half-two": {"zero_stage": 2, "dtype": "bfloat16"},
    "half-three": {"zero_stage": 3, "dtype": "bfloat16"},
}
STEPS, KEPT_WHOLE = 3, 64
"""ZeRO 3 shards weights of more elements than that; left to itself, it would shard none of a model so small."""


def run_of(folder, name):
    cluster = {"dtype": "float32", **KINDS[name], "storage_path": str(folder / "runs")}
    stage = {"data": str(folder / "data.json"), "max_length": 512, "processes": 0}
    raw = {"name": name, "steps": STEPS, "samples_per_worker": 1, "global_batch": 4, "cluster": cluster, "stage": stage,
           "init_from": str(folder / "imported"), "output": str(folder / name), "checkpoint_every": STEPS - 1,
           "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2, "weight_decay": 0.1}}  # fmt: skip
    return build_settings(RunConfig, raw)


def sharding(*arguments):
    config = deepspeed_config(*arguments)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = KEPT_WHOLE
    return config


def train(rank, folder):
    torch._dynamo.config.disable = True  # DeepSpeed compiles a sum of gradients under ZeRO 3: minutes of a slow core
    start_worker(rank, 2, folder / "store")
    training.trainer.deepspeed_config = sharding
    held = []
    training.conversation_stage.exported_tensors = lambda model: watched(model, held)
    for name in KINDS:
        assert train_without_ray(run_of(folder, name), TASK) == {}
        if name == "three" and rank == 0:
            (folder / "whole.json").write_text(json.dumps(held))
    again = dataclasses.replace(run_of(folder, "three"), output=str(folder / "resumed"))
    assert train_without_ray(again, TASK, since=folder / "runs" / "three" / name_of(STEPS - 1)) == {}


def watched(model, held):
    """The tensors of an export. `held` gets, at each, the elements of all weights that are whole at that moment but for
    those that always are, and its own."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    parts = [p for p in model.parameters() if getattr(p, "ds_numel", 0) > KEPT_WHOLE]
    for name, tensor in exported_tensors(model):
        held.append((sum(p.ds_numel for p in parts if p.ds_status == ZeroParamStatus.AVAILABLE), tensor.numel()))
        yield name, tensor


def losses_of(folder, name):
    lines = (folder / "runs" / name / "steps.jsonl").read_text().splitlines()
    return {(of_step := json.loads(line))["step"]: of_step["loss"] for line in lines}


def test_weights_in_parts_are_trained_as_whole_ones(tmp_path):
    make_conversations(tmp_path)
    torch.multiprocessing.start_processes(train, (tmp_path,), 2, start_method="fork")
    losses = {name: losses_of(tmp_path, name) for name in KINDS}
    assert set(losses["two"]) == set(range(STEPS))
    assert losses["three"] == pytest.approx(losses["two"], rel=1e-5) == losses["offloaded"]
    assert losses["half-three"] == pytest.approx(losses["half-two"], rel=1e-3) != losses["two"]
    before, whole = load_stage(tmp_path / "imported", "llm"), load_stage(tmp_path / "two", "llm")
    for name in ("three", "offloaded", "resumed"):
        parts = load_stage(tmp_path / name, "llm")
        assert parts.keys() == whole.keys()
        for tensor, weights in parts.items():
            torch.testing.assert_close(weights, whole[tensor], rtol=1e-3, atol=1e-4)
    assert any(not torch.equal(before[tensor], weights) for tensor, weights in whole.items())
    unbroken, resumed = (load_stage(tmp_path / name, "llm") for name in ("three", "resumed"))
    assert all(torch.equal(weights, resumed[tensor]) for tensor, weights in unbroken.items())
    held = json.loads((tmp_path / "whole.json").read_text())
    assert max(whole for whole, _ in held) > KEPT_WHOLE and all(whole in (0, own) for whole, own in held)
