"""ZeRO 3, with its weights in the host's memory too, takes the steps that ZeRO 2 takes, on two workers."""

import json

import pytest
import torch

from services.checkpoint.store import load_stage
from services.common.settings import build_settings
from tests.conversation_data import make_conversations
from tests.without_ray import start_worker, train_without_ray
from training.config import RunConfig

TASK = ("training.conversation_stage", "ConversationTask")
KINDS = {"two": (2, "none"), "three": (3, "none"), "offloaded": (3, "all")}


def run_of(folder, name):
    zero_stage, offload = KINDS[name]
    cluster = {"zero_stage": zero_stage, "offload": offload, "dtype": "float32", "storage_path": str(folder / "runs")}
    stage = {"data": str(folder / "data.json"), "max_length": 512, "processes": 0}
    raw = {"name": name, "steps": 3, "samples_per_worker": 2, "global_batch": 8, "cluster": cluster, "stage": stage,
           "init_from": str(folder / "imported"), "output": str(folder / name), "checkpoint_every": 9,
           "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2, "weight_decay": 0.1}}  # fmt: skip
    return build_settings(RunConfig, raw)


def train(rank, folder):
    torch._dynamo.config.disable = True  # DeepSpeed compiles a sum of gradients under ZeRO 3: minutes of a slow core
    start_worker(rank, 2, folder / "store")
    for name in KINDS:
        assert train_without_ray(run_of(folder, name), TASK) == {}


def test_weights_in_parts_are_trained_as_whole_ones(tmp_path):
    make_conversations(tmp_path)
    torch.multiprocessing.start_processes(train, (tmp_path,), 2, start_method="fork")
    losses = {
        name: [json.loads(line)["loss"] for line in (tmp_path / "runs" / name / "steps.jsonl").read_text().splitlines()]
        for name in KINDS
    }
    assert losses["three"] == pytest.approx(losses["two"], rel=1e-5) == losses["offloaded"]
    before, whole = load_stage(tmp_path / "imported", "llm"), load_stage(tmp_path / "two", "llm")
    for name in ("three", "offloaded"):
        parts = load_stage(tmp_path / name, "llm")
        assert parts.keys() == whole.keys()
        for tensor, weights in parts.items():
            torch.testing.assert_close(weights, whole[tensor], rtol=1e-3, atol=1e-4)
    assert any(not torch.equal(before[tensor], weights) for tensor, weights in whole.items())
