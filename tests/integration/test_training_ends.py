"""How the training command ends, as a shell sees it: at a loss that is wrong, and without the steps that made it so.

The commands run in one process, whose Ray they share; Ray's start is most of such a run.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import yaml

from tests.conversation_data import make_conversations
from training.launch import DIVERGED, WRONG

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import json, runpy, sys
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["training/finetune.py", *arguments]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code
    print("ended with", code, file=sys.stderr, flush=True)
"""


def test_a_run_that_diverges_says_at_which_step_and_goes_on_without_it(tmp_path):
    make_conversations(tmp_path)
    config = tmp_path / "run.yaml"
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
    config.write_text(yaml.safe_dump(raw))
    command = ["--config", str(config)]
    commands = [[*command, "--set", "samples_per_worker=0"], command, [*command, "--set", "skip_steps=[2,3]"]]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        cwd=ROOT, env=os.environ | {"RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    codes = [int(line.split()[-1]) for line in done.stderr.splitlines() if line.startswith("ended with")]
    assert codes == [WRONG, DIVERGED, 0], done.stderr
    assert f"{config}: samples_per_worker: is 0" in done.stderr
    wrong = r"step 2: the loss is nan. Nothing of the step was kept; .*checkpoint.* --set skip_steps=\[2\]"
    assert re.search(rf"steep stopped: {wrong} goes on", done.stderr)
    steps = [json.loads(line)["step"] for line in (tmp_path / "runs/steep/steps.jsonl").read_text().splitlines()]
    assert set(steps) == {0, 1} and re.search(r"resumed at step [12] of 4", done.stdout)
    assert (tmp_path / "made" / "config.json").exists()
