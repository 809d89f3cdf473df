"""How the training command ends, as a shell sees it: at a loss that is wrong, and without the steps that made it so.

One Ray is up all the time: a command joins it where RAY_ADDRESS says so, and else trains on one of its own beside it.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

from evaluation.study.cluster import SharedRay
from tests.conversation_data import make_conversations
from training.launch import DIVERGED, DONE, WRONG

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path):
    make_conversations(tmp_path)
    path = tmp_path / "run.yaml"
    raw = {
        "name": "steep",
        "steps": 4,
        "samples_per_worker": 2,
        "init_from": str(tmp_path / "imported"),
        "output": str(tmp_path / "made"),
        "checkpoint_every": 1,
        "optimizer": {"learning_rate": 1e6, "warmup_steps": 2},
        "cluster": {"workers": 1, "storage_path": str(tmp_path / "runs"), "dtype": "float32", "cpus_per_worker": 0.5},
        "stage": {"data": str(tmp_path / "data.json"), "max_length": 512, "processes": 0},
    }
    path.write_text(yaml.safe_dump(raw))
    return path


def command(config, *changes, ray):
    """Runs the command; `ray`: the variables with which it finds one."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(
        [sys.executable, "training/finetune.py", "--config", str(config), *(f"--set={change}" for change in changes)],
        cwd=ROOT, env=environment | ray | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip


def test_a_run_that_diverges_says_at_which_step_and_goes_on_without_it(config, tmp_path):
    wrong = command(config, "samples_per_worker=0", ray={})
    assert wrong.returncode == WRONG and f"{config}: samples_per_worker: is 0" in wrong.stderr
    with SharedRay(2) as shared:
        stopped = command(config, ray=shared.environment)
        assert stopped.returncode == DIVERGED, stopped.stderr[-3000:]
        why = r"step 2: the loss is nan. Nothing of the step was kept; .*checkpoint.* --set skip_steps=\[2\]"
        assert re.search(rf"steep stopped: {why} goes on", stopped.stderr)
        assert "a Ray of its own" not in stopped.stdout
        done = command(config, "skip_steps=[2,3]", ray={})
    assert done.returncode == DONE and "a Ray of its own" in done.stdout, done.stderr[-3000:]
    steps = [json.loads(line)["step"] for line in (tmp_path / "runs/steep/steps.jsonl").read_text().splitlines()]
    assert set(steps) == {0, 1} and re.search(r"resumed at step [12] of 4", done.stdout)
    assert (tmp_path / "made" / "config.json").exists()
