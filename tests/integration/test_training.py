"""Fine-tuning on Ray Train with two DeepSpeed ZeRO-2 workers: one is killed, the run resumes, its export answers."""

import os
import pathlib
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

ROOT = pathlib.Path(__file__).parents[2]
STEPS, CHECKPOINT_EVERY = 60, 10
SELECTOR_STEPS, ENCODER_STEPS = 25, 45


def configuration(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "run.yaml"
    raw = {
        "name": "killed",
        "steps": STEPS,
        "samples_per_worker": 2,
        "output": str(folder / "export"),
        "checkpoint_every": CHECKPOINT_EVERY,
        "log_every": 1,
        "optimizer": {
            "learning_rate": 4e-3,
            "warmup_steps": 4,
            "selector_steps": SELECTOR_STEPS,
            "encoder_steps": ENCODER_STEPS,
            "rest_cooldown": 10,
        },
        "cluster": {"storage_path": str(folder / "runs"), "cpus_per_worker": 0.5},
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
        time.sleep(0.3)
    raise AssertionError(f"no {pattern!r} within {seconds} s:\n{text[-3000:]}")


def check_encoder_rested(folder: pathlib.Path) -> None:
    """The encoder is the same in the last two checkpoints, both after ENCODER_STEPS, and its selector has learned."""
    files = sorted(folder.glob("runs/killed/checkpoint_*/state/mp_rank_00_model_states.pt"))
    states = [torch.load(file, weights_only=False) for file in files[-2:]]
    assert [state["step"] for state in states] == [STEPS - CHECKPOINT_EVERY, STEPS]
    before, after = (state["module"] for state in states)
    encoder = [name for name in after if name.startswith("encoder.")]
    assert encoder and all(torch.equal(before[name], after[name]) for name in encoder)
    assert any(after[name].any() for name in encoder if name.endswith("selector.linear.weight"))  # starts at zero
    assert not any(
        torch.equal(before[name], after[name]) for name in set(after) - set(encoder) if name.endswith("q_proj.weight")
    )


def test_a_killed_worker_resumes_and_the_export_answers(tmp_path):
    log = tmp_path / "log.txt"
    command = [sys.executable, "training/finetune.py", "--config", str(configuration(tmp_path))]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with log.open("wb") as out:
        # "local" starts a Ray of its own whatever else runs on the machine.
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
                                   env={**environment, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"})  # fmt: skip
    try:
        # A checkpoint counts once it is registered, which the next one's being written makes certain.
        wait_for(log, rf" 2[5-9]/{STEPS} ", process, 400)
        workers = [
            p
            for p in psutil.Process(process.pid).children(recursive=True)
            if "RayTrainWorker" in p.name() + " ".join(p.cmdline())
        ]
        assert workers
        workers[0].send_signal(signal.SIGKILL)
        resumed = int(wait_for(log, rf"resumed at step (\d+) of {STEPS}", process, 300).group(1))
        assert resumed % CHECKPOINT_EVERY == 0 and 0 < resumed < STEPS
        assert process.wait(timeout=400) == 0, log.read_text(encoding="utf8")[-3000:]
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=30)
    text = log.read_text(encoding="utf8", errors="replace")
    losses = {int(step): float(loss) for step, loss in re.findall(rf"killed (\d+)/{STEPS}  loss ([\d.]+)", text)}
    assert losses[STEPS] < 0.85 * losses[1]
    assert "balance" in text and "kept_share" in text
    check_encoder_rested(tmp_path)

    pipeline = EncoderPipeline.from_checkpoint(tmp_path / "export", dtype=torch.float32)
    engine = Engine.from_checkpoint(tmp_path / "export", dtype=torch.float32, kv_cache_bytes=1 << 24)
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
