"""Fine-tuning on Ray Train with two DeepSpeed workers: a worker, the command and Ray are killed; the export answers.

It ends with the weights of a run left alone, which two processes make without Ray.
"""

import contextlib
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import psutil
import torch
import yaml

from services.common.types import FinishedEvent, GenerateRequest, ImagePart, PromptTurn, SamplingParams, TextPart
from services.encoder.pipeline import EncoderPipeline
from services.llm.engine import Engine
from tests.tiny_training import MODEL
from tests.without_ray import start_worker, train_without_ray
from training import checkpoints
from training.config import load
from training.launch import LOST, absolute

ROOT = pathlib.Path(__file__).parents[2]
STEPS, CHECKPOINT_EVERY = 36, 4
SELECTOR_STEPS, ENCODER_STEPS = 16, 28
SEED = random.randrange(1000)


def configuration(folder: pathlib.Path, name: str) -> pathlib.Path:
    path = folder / f"{name}.yaml"
    raw = {
        "name": name,
        "steps": STEPS,
        "samples_per_worker": 1,
        "global_batch": 4,
        "output": str(folder / f"{name}-export"),
        "checkpoint_every": CHECKPOINT_EVERY,
        "log_every": 1,
        "optimizer": {
            "learning_rate": 4e-3,
            "warmup_steps": 4,
            "selector_steps": SELECTOR_STEPS,
            "encoder_steps": ENCODER_STEPS,
            "rest_cooldown": 10,
        },
        "cluster": {"storage_path": str(folder / "runs"), "cpus_per_worker": 0.5, "dtype": "float32"},
        "stage": {"model": MODEL, "prune": {"layers": [1, 3], "thresholds": [0.7, 1.0]}, "questions_per_image": 4},
    }
    path.write_text(yaml.safe_dump(raw), encoding="utf8")
    return path


class Command:
    """The command of a run, started anew; Ray and the workers are its children."""

    def __init__(self, config: pathlib.Path, log: pathlib.Path):
        # The last has Ray give up a lost GCS soon.
        environment = {"OMP_NUM_THREADS": "1", "RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
        command = [sys.executable, "training/finetune.py", "--config", str(config)]
        self.log = log
        with log.open("wb") as out:
            self.process = psutil.Popen(
                command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=os.environ | environment
            )
        self.started: list[psutil.Process] = []

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        """Ends what a kill has left."""
        for process in (self.process, *self.started):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def text(self) -> str:
        return self.log.read_text(encoding="utf8", errors="replace")

    def wait_for(self, pattern: str, seconds: float = 400) -> re.Match:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := re.search(pattern, self.text()):
                return found
            assert self.process.poll() is None, f"training ended early:\n{self.text()[-3000:]}"
            time.sleep(0.1)
        raise AssertionError(f"no {pattern!r} within {seconds} s:\n{self.text()[-3000:]}")

    def end(self) -> int:
        return self.process.wait(timeout=400)

    def kill(self, rng: random.Random, name: str) -> None:
        """Kills one of its processes of that name, or itself, at any moment of a step."""
        time.sleep(rng.random() / 2)
        self.started = self.process.children(recursive=True)
        named = [one for one in self.started if name in one.name() + " ".join(one.cmdline())]
        rng.choice(named or [self.process]).send_signal(signal.SIGKILL)


def alone(rank: int, folder: pathlib.Path, config: pathlib.Path) -> None:
    """One of two workers that nobody kills."""
    start_worker(rank, 2, folder / "store")
    run = absolute(load(config, ["name=alone", f"output={folder}/alone-export"]))
    assert train_without_ray(run, ("training.experiments.task", "ExperimentTask")) == {}


def tensors_of(value, path=""):
    """Every tensor of a checkpoint's files, by its path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {name: tensor for key, below in pairs for name, tensor in tensors_of(below, f"{path}/{key}").items()}


def saved(checkpoint: pathlib.Path) -> dict[str, torch.Tensor]:
    files = sorted(checkpoint.rglob("*.pt"))
    assert len(files) == 5, "weights, and of each worker its part of the optimizer and its random state"
    return {key: tensor for file in files
            for key, tensor in tensors_of(torch.load(file, weights_only=False), file.name).items()}  # fmt: skip


def check_encoder_rested(folder: pathlib.Path) -> None:
    """The encoder is the same in the last two checkpoints, both after ENCODER_STEPS, and its selector has learned."""
    states = [checkpoints.state_of(kept) for kept in checkpoints.whole(folder)]
    assert [state["step"] for state in states] == [STEPS - CHECKPOINT_EVERY, STEPS]
    before, after = (state["module"] for state in states)
    encoder = [name for name in after if name.startswith("model.encoder.")]
    assert encoder and all(torch.equal(before[name], after[name]) for name in encoder)
    assert any(after[name].any() for name in encoder if name.endswith("selector.linear.weight"))  # starts at zero
    assert not any(
        torch.equal(before[name], after[name]) for name in set(after) - set(encoder) if name.endswith("q_proj.weight")
    )


def test_a_killed_run_ends_with_the_weights_of_one_left_alone(tmp_path):
    rng, config = random.Random(SEED), configuration(tmp_path, "killed")
    folder, logs = tmp_path / "runs" / "killed", [tmp_path / f"log{number}.txt" for number in range(3)]
    others = torch.multiprocessing.start_processes(alone, (tmp_path, config), 2, join=False, start_method="fork")
    resumed = []

    def goes_on(command: Command) -> None:
        resumed.append(int(command.wait_for(rf"resumed at step (\d+) of {STEPS}").group(1)))
        assert resumed[-1] % CHECKPOINT_EVERY == 0 and 0 < resumed[-1] < STEPS
        command.wait_for(rf"killed {resumed[-1] + 1}/{STEPS} ")

    try:
        with Command(config, logs[0]) as command:
            # A checkpoint counts once it is registered, seconds after it was written.
            while not checkpoints.whole(folder):
                assert command.process.poll() is None, command.text()[-3000:]
                time.sleep(0.1)
            command.kill(rng, "RayTrainWorker")
            goes_on(command)
            command.kill(rng, "the command itself")
            assert command.end() == -signal.SIGKILL
        with Command(config, logs[1]) as command:
            goes_on(command)
            command.kill(rng, part := rng.choice(("raylet", "gcs_server")))
            assert command.end() == LOST, f"{part} was killed, SEED {SEED}"
            last = command.text()[-3000:]
            assert "killed ended: " in last and last.endswith("The same command goes on from the last checkpoint.\n")
        with Command(config, logs[2]) as command:
            goes_on(command)
            assert command.end() == 0, command.text()[-3000:]
        while not others.join(timeout=300):
            pass
    finally:
        for left in others.processes:
            left.kill()
    expected = saved(tmp_path / "runs" / "alone" / checkpoints.name_of(STEPS))
    found = saved(checkpoints.whole(folder)[-1])
    assert expected.keys() == found.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
    assert different == [], f"SEED {SEED}, resumed at steps {resumed}"

    text = "".join(log.read_text(encoding="utf8", errors="replace") for log in logs)
    losses = {int(step): float(loss) for step, loss in re.findall(rf"killed (\d+)/{STEPS}  loss ([\d.]+)", text)}
    assert losses[STEPS] < 0.85 * losses[1]
    assert "balance" in text and "kept_share" in text
    check_encoder_rested(folder)
    answers(tmp_path / "killed-export")


def answers(export: pathlib.Path) -> None:
    pipeline = EncoderPipeline.from_checkpoint(export, dtype=torch.float32)
    engine = Engine.from_checkpoint(export, dtype=torch.float32, kv_cache_bytes=1 << 24)
    image = (ROOT / "docs/assets/sample.png").read_bytes()
    (tokens,) = pipeline.encode([pipeline.prepare(image)], [True])
    turn = PromptTurn(role="user", parts=(ImagePart(image=0), TextPart(text="What number is on the blue card?")))
    engine.submit(
        GenerateRequest(request_id="r", turns=(turn,), images=(tokens,), sampling=SamplingParams(max_tokens=4))
    )
    events = []
    while engine.has_work():
        events += [event for _, event in engine.step()]
    assert isinstance(events[-1], FinishedEvent)
    assert events[-1].usage.visual_tokens_kept <= events[-1].usage.visual_tokens_sampled
