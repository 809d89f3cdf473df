"""Fine-tuning on Ray Train with two DeepSpeed workers: one is killed, the run resumes, and its export answers.

It ends with the weights of a run left alone, which two processes make without Ray.
"""

import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import psutil
import ray.train
import torch
import yaml

from services.common.types import FinishedEvent, GenerateRequest, ImagePart, PromptTurn, SamplingParams, TextPart
from services.encoder.pipeline import EncoderPipeline
from services.llm.engine import Engine
from tests.tiny_training import MODEL
from training import checkpoints
from training.config import load, run_folder
from training.launch import absolute
from training.trainer import Worker

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


def wait_for(log: pathlib.Path, pattern: str, process: subprocess.Popen, seconds: float) -> re.Match:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        text = log.read_text(encoding="utf8", errors="replace")
        if found := re.search(pattern, text):
            return found
        assert process.poll() is None, f"training ended early:\n{text[-3000:]}"
        time.sleep(0.1)
    raise AssertionError(f"no {pattern!r} within {seconds} s:\n{text[-3000:]}")


def alone(rank: int, folder: pathlib.Path, config: pathlib.Path) -> None:
    """One of two workers that nobody kills, as Ray Train would start it."""
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    run = absolute(load(config, ["name=alone", f"output={folder}/alone-export"]))

    def keep(metrics, checkpoint, checkpoint_dir_name, **_):
        shutil.copytree(checkpoint.path, run_folder(run) / checkpoint_dir_name, dirs_exist_ok=True)
        shutil.rmtree(checkpoint.path)

    ray.train.get_checkpoint, ray.train.report = lambda: None, keep
    ray.train.get_context = lambda: types.SimpleNamespace(get_local_rank=lambda: rank)
    run_folder(run).mkdir(parents=True, exist_ok=True)
    checkpoints.seed(run.seed)
    task = ("training.experiments.task", "ExperimentTask")
    assert Worker(run, checkpoints.what_it_is_made_of(run), task, rank, 2).train() == {}


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
    encoder = [name for name in after if name.startswith("encoder.")]
    assert encoder and all(torch.equal(before[name], after[name]) for name in encoder)
    assert any(after[name].any() for name in encoder if name.endswith("selector.linear.weight"))  # starts at zero
    assert not any(
        torch.equal(before[name], after[name]) for name in set(after) - set(encoder) if name.endswith("q_proj.weight")
    )


def test_a_killed_run_ends_with_the_weights_of_one_left_alone(tmp_path):
    rng, log, config = random.Random(SEED), tmp_path / "log.txt", configuration(tmp_path, "killed")
    command = [sys.executable, "training/finetune.py", "--config", str(config)]
    # "local" starts a Ray of its own whatever else runs on the machine.
    environment = {**os.environ, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"}
    others = torch.multiprocessing.start_processes(alone, (tmp_path, config), 2, join=False, start_method="fork")
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        wait_for(log, rf"killed {CHECKPOINT_EVERY}/{STEPS} ", process, 400)
        # A checkpoint counts once it is registered, seconds after it was written.
        while not checkpoints.whole(tmp_path / "runs" / "killed"):
            assert process.poll() is None, log.read_text(errors="replace")[-3000:]
            time.sleep(0.1)
        time.sleep(rng.random())
        workers = [
            p
            for p in psutil.Process(process.pid).children(recursive=True)
            if "RayTrainWorker" in p.name() + " ".join(p.cmdline())
        ]
        rng.choice(workers).send_signal(signal.SIGKILL)
        resumed = int(wait_for(log, rf"resumed at step (\d+) of {STEPS}", process, 300).group(1))
        assert resumed % CHECKPOINT_EVERY == 0 and 0 < resumed < STEPS
        assert process.wait(timeout=400) == 0, log.read_text(errors="replace")[-3000:]
        while not others.join(timeout=300):
            pass
    finally:
        for left in (process, *others.processes):
            left.kill()
    text = log.read_text(encoding="utf8", errors="replace")
    expected = saved(tmp_path / "runs" / "alone" / checkpoints.name_of(STEPS))
    found = saved(checkpoints.whole(tmp_path / "runs" / "killed")[-1])
    assert expected.keys() == found.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
    assert different == [], f"SEED {SEED}, resumed at step {resumed}"

    losses = {int(step): float(loss) for step, loss in re.findall(rf"killed (\d+)/{STEPS}  loss ([\d.]+)", text)}
    assert losses[STEPS] < 0.85 * losses[1]
    assert "balance" in text and "kept_share" in text
    check_encoder_rested(tmp_path / "runs" / "killed")
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
