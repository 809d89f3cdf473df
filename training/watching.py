"""What a run tells about itself: running means over all workers, the line of the log, trackers, and warnings."""

from __future__ import annotations

import json
import pathlib
import resource
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from services.common.telemetry import Metrics
from training.config import RunConfig
from training.plan.operations import PEAK
from training.trackers import Trackers

KEPT = 0.9
"""Share of a running mean that the next step leaves."""
LEAST_SHARE, MOST_SHARE = 0.01, 0.98
"""A branch with less or more of the regions than this hardly chooses."""
PATIENCE = 5
"""Lines of the log that a branch may stay outside before a warning."""
FIRST_MEAN, EARLY = 20, 10
"""Steps whose running mean says little: in them a loss may be so many times farther above it."""
STEPS_FILE = "steps.jsonl"
"""Every step's own values, a line each, in the run's folder; a resumed run repeats the lines since its checkpoint."""
AMOUNTS = ("visual_tokens", "text_tokens", "flops")
"""Metrics that say how much a micro-batch was, not how well it went."""
RATE = "rate_"
"""The beginning of the name of a part's learning rate."""
EXACT = ("step", RATE)
"""Metrics by the beginnings of their names that have no running mean."""
SILENT = ("step", *AMOUNTS, "kept_layer_", RATE)
"""Metrics by the beginnings of their names that trackers have and the log's line has not."""


class LossGuard:
    """Finds a loss that is not a number, or far above its running mean. Every worker sees the same losses."""

    def __init__(self, run: RunConfig):
        self.ratio = run.max_loss_ratio
        self.mean, self.seen = 0.0, 0

    def check(self, loss: float) -> str:
        """What is wrong with the loss of a step, empty where nothing is."""
        times = self.ratio * (1 if self.seen >= FIRST_MEAN else EARLY)
        if not abs(loss) < float("inf"):
            return f"the loss is {loss}"
        if self.ratio and self.seen and loss > times * max(self.mean, 0.1):
            return f"the loss is {loss:.3g}, above {times:g} x its running mean {self.mean:.3g} (max_loss_ratio)"
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
                 metrics: Metrics | None = None, state: dict[str, Any] | None = None):  # fmt: skip
        """folder: the run's, for trackers and STEPS_FILE; None writes none.

        micro_batches: those of a global batch. metrics: where the values go besides. state: of the checkpoint that the
        run goes on from. Raises InvalidInput for a tracker that cannot be opened.
        """
        state = state or {"means": {}, "trackers": {}}
        self.run, self.micro_batches, self._metrics = run, micro_batches, metrics or Metrics("training")
        self.means: dict[str, float] = dict(state["means"])
        self._steps: list[dict[str, float]] = []
        self._began = self._last = time.perf_counter()
        self._start = start
        self._waited, self._outside = 0.0, dict[str, int]()
        self._worked: Counter[str] = Counter()
        """What all workers together have worked through since the last line of the log."""
        self._trackers, self._steps_file = None, None
        if folder and rank == 0:
            self._trackers = Trackers(run, folder, start, state["trackers"])
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
            self._worked.update({name: row[name] * self.micro_batches for name in AMOUNTS if name in row})
            self._worked["samples"] += self.run.samples_per_worker * self.micro_batches
        if self._steps_file:
            with self._steps_file.open("a", encoding="utf8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        self._steps = []

    def log(self, done: int) -> None:
        """Prints the line of a step and writes the trackers'; rank 0 only."""
        now = time.perf_counter()
        seconds = now - self._last
        per_step = (now - self._began) / (done - self._start)
        speed = {name.replace("_", " "): value / seconds for name, value in self._worked.items()}
        waiting, memory = self._waited / seconds, _memory_gib()
        self._last, self._waited, self._worked = now, 0.0, Counter()
        shown = "  ".join(f"{k} {v:.3f}" for k, v in self.means.items() if not k.startswith(SILENT))
        rates = {k.removeprefix(RATE): v for k, v in self.means.items() if k.startswith(RATE)}
        shown += "  rate " + ", ".join(f"{part} {rate:.2e}" for part, rate in rates.items())
        flops = speed.pop("flops", 0.0)
        speeds = "  ".join(f"{value:.4g} {name}/s" for name, value in speed.items())
        if flops and (peak := _peak_flops()):
            speed["mfu"] = flops / (peak * torch.distributed.get_world_size())
            speeds += f"  MFU {speed['mfu']:.1%}"
        left = per_step * (self.run.steps - done) / 60
        print(
            f"{self.run.name} {done}/{self.run.steps}  {shown}  {speeds}  {waiting:.0%} waiting for data  "
            f"{memory:.2f} GiB  {per_step:.2f} s/step  {left:.1f} min left",
            flush=True,
        )
        speed |= {"waiting_share": waiting, "memory_gib": memory, "s_per_step": per_step}
        self.write("train", self.means, done)
        self.write("speed", {name.replace(" ", "_"): value for name, value in speed.items()}, done)
        self._warn_of_collapse()

    def write(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Values for the trackers and for Ray's metrics, named group/NAME."""
        named = {f"{group}/{name}": value for name, value in values.items()}
        for name, value in named.items():
            self._metrics.set("focusllava_training", value, run=self.run.name, series=name)
        if self._trackers:
            self._trackers.write(named, step)

    def close(self) -> None:
        if self._trackers:
            self._trackers.close()

    def state(self) -> dict[str, Any]:
        return {"means": self.means, "trackers": self._trackers.ids if self._trackers else {}}

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
