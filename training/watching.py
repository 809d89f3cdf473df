"""What a run tells about itself: running means over all workers, the line of the log, TensorBoard, and warnings."""

from __future__ import annotations

import json
import pathlib
import resource
import time
from typing import Any

import torch
from tensorboardX import SummaryWriter

from services.common.telemetry import Metrics
from training.config import RunConfig
from training.plan.operations import PEAK

KEPT = 0.9
"""Share of a running mean that the next step leaves."""
LEAST_SHARE, MOST_SHARE = 0.01, 0.98
"""A branch with less or more of the regions than this hardly chooses."""
PATIENCE = 5
"""Lines of the log that a branch may stay outside before a warning."""
FIRST_MEAN = 20
"""Steps before a loss is compared with its running mean."""
STEPS_FILE = "steps.jsonl"
"""Every step's own values, a line each, in the run's folder; a resumed run repeats the lines since its checkpoint."""
EXACT = ("step", "rate_")
"""Metrics by the beginnings of their names that have no running mean."""
SILENT = ("step", "visual_tokens", "text_tokens", "flops", "kept_layer_", "rate_")
"""Metrics by the beginnings of their names that TensorBoard has and the log's line has not."""


class LossGuard:
    """Finds a loss that is not a number, or far above its running mean. Every worker sees the same losses."""

    def __init__(self, run: RunConfig):
        self.ratio = run.max_loss_ratio
        self.mean, self.seen = 0.0, 0

    def check(self, loss: float) -> str:
        """What is wrong with the loss of a step, empty where nothing is."""
        limit = self.ratio * max(self.mean, 0.1)
        if not abs(loss) < float("inf"):
            return f"the loss is {loss}"
        if self.ratio and self.seen >= FIRST_MEAN and loss > limit:
            return f"the loss is {loss:.3g}, above {self.ratio:g} x its running mean {self.mean:.3g} (max_loss_ratio)"
        self.mean = KEPT * self.mean + (1 - KEPT) * loss if self.seen else loss
        self.seen += 1
        return ""

    def state(self) -> dict[str, Any]:
        return {"mean": self.mean, "seen": self.seen}

    def load(self, state: dict[str, Any]) -> None:
        self.mean, self.seen = state["mean"], state["seen"]


class Watch:
    """Running means of what each step measures on every worker. `flush` is called by all workers at once."""

    def __init__(self, run: RunConfig, *, rank: int, micro_batches: int, start: int, folder: pathlib.Path | None,
                 metrics: Metrics | None = None):  # fmt: skip
        """folder: the run's, for TensorBoard's files and STEPS_FILE; None writes none.

        micro_batches: those of a global batch. metrics: where the values go besides.
        """
        self.run, self.micro_batches, self._metrics = run, micro_batches, metrics or Metrics("training")
        self.means: dict[str, float] = {}
        self._steps: list[dict[str, float]] = []
        self._began = self._last = time.perf_counter()
        self._start = self._last_step = start
        self._waited, self._outside = 0.0, dict[str, int]()
        self._writer, self._steps_file = None, None
        if folder and rank == 0:
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
            self._steps_file = folder / STEPS_FILE

    def add(self, step: int, micro_batches: list[dict[str, float]], more: dict[str, float], waited: float) -> None:
        """Takes in a step: the metrics of this worker's micro-batches, those of the step, and seconds without data."""
        self._steps.append({"step": step, **more, **_means(micro_batches)})
        self._waited += waited

    def flush(self) -> None:
        """Takes the steps since the last flush of all workers into the running means."""
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, self._steps)
        rows = [_means(of_step) for of_step in zip(*everyone, strict=True)]
        for row in rows:
            for name, value in row.items():
                before = self.means.get(name)
                smooth = before is not None and not name.startswith(EXACT)
                self.means[name] = KEPT * before + (1 - KEPT) * value if smooth and before is not None else value
        if self._steps_file:
            with self._steps_file.open("a", encoding="utf8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        self._steps = []

    def log(self, done: int) -> None:
        """Prints the line of a step and writes TensorBoard's; rank 0 only."""
        now = time.perf_counter()
        seconds, steps = now - self._last, done - self._last_step
        per_step = (now - self._began) / (done - self._start)
        speed = {name: value * steps / seconds for name, value in self._amounts().items()}
        waiting, memory = self._waited / seconds, _memory_gib()
        self._last, self._last_step, self._waited = now, done, 0.0
        shown = "  ".join(f"{k} {v:.3f}" for k, v in self.means.items() if not k.startswith(SILENT))
        shown += f"  rate {max((v for k, v in self.means.items() if k.startswith('rate_')), default=0.0):.2e}"
        rates = "  ".join(f"{value:.4g} {name}/s" for name, value in speed.items() if name != "flops")
        if (peak := _peak_flops()) and "flops" in speed:
            speed["mfu"] = speed.pop("flops") / (peak * torch.distributed.get_world_size())
            rates += f"  MFU {speed['mfu']:.1%}"
        speed.pop("flops", None)
        left = per_step * (self.run.steps - done) / 60
        print(
            f"{self.run.name} {done}/{self.run.steps}  {shown}  {rates}  {waiting:.0%} waiting for data  "
            f"{memory:.2f} GiB  {per_step:.2f} s/step  {left:.1f} min left",
            flush=True,
        )
        for name, value in self.means.items():
            self.write(f"train/{name}", value, done)
        for name, value in {**speed, "waiting_share": waiting, "memory_gib": memory, "s_per_step": per_step}.items():
            self.write(f"speed/{name.replace(' ', '_')}", value, done)
        self._warn_of_collapse()

    def write(self, name: str, value: float, step: int) -> None:
        """One value for TensorBoard and for Ray's metrics."""
        self._metrics.set("focusllava_training", value, run=self.run.name, series=name)
        if self._writer:
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer:
            self._writer.close()

    def state(self) -> dict[str, Any]:
        return {"means": self.means}

    def load(self, state: dict[str, Any]) -> None:
        self.means = dict(state["means"])

    def _amounts(self) -> dict[str, float]:
        """What a step works through, all workers together."""
        micro = {"visual_tokens": "visual tokens", "text_tokens": "text tokens", "flops": "flops"}
        amounts = {new: self.means[old] * self.micro_batches for old, new in micro.items() if old in self.means}
        return {"samples": float(self.run.samples_per_worker * self.micro_batches), **amounts}

    def _warn_of_collapse(self) -> None:
        for name, share in self.means.items():
            if name.startswith("branch_"):
                outside = not LEAST_SHARE <= share <= MOST_SHARE
                self._outside[name] = self._outside.get(name, 0) + 1 if outside else 0
                if self._outside[name] == PATIENCE:
                    print(
                        f"warning: collapsed selector: {name} has {share:.1%} of the regions in the last {PATIENCE} "
                        "lines; see docs/training.md, When the selector collapses",
                        flush=True,
                    )


def _means(rows: Any) -> dict[str, float]:
    """The mean of each metric over the rows that have it, in the order of their first appearance."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    return {name: sum(of_name) / len(of_name) for name, of_name in values.items()}


def _memory_gib() -> float:
    """The most that this worker has held: of the GPU's memory, else of the host's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _peak_flops() -> float:
    """Dense bf16 FLOP/s of this worker's GPU; 0 where they are not known."""
    if not torch.cuda.is_available():
        return 0.0
    words = torch.cuda.get_device_name().replace("-", " ").split()
    return next((peak for word, peak in PEAK.items() if word in words), 0.0)
