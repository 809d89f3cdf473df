"""What reading real files costs a training step: JPEG files read, decoded and tiled in the background against tensors
that are in memory already.

    python -m benchmarks.loading [--checkpoint FOLDER] [--processes 2] [--out loading]

A step is the loss, its gradients and AdamW on a micro-batch of conversations, each about one photo-like JPEG of 1,344 x
1,344 pixels, on one thread as a worker has. Both peers take the same micro-batches in turns. A turn's first steps are
not counted: what was read ahead while the other peer had its turn is used up in them. Processor time is the training
process's alone: on a busy machine, where those that read wait for a core, it still says what loading costs that one.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import machine, median, print_table, ratio_of, take_turns, write_results
from services.common.settings import build_settings
from services.compute.malloc import keep_freed_memory
from training.config import RunConfig
from training.conversation_stage import ConversationTask

SIDE = 1344
IMAGES = 32
ANSWER = "It is the kind of place that people pass by in the morning without looking up, and come back to at night."


def write_data(folder: pathlib.Path) -> pathlib.Path:
    """Conversations about images of smooth colours with some noise on them, which JPEG compresses as photos."""
    draw, entries = np.random.default_rng(0), []
    for number in range(IMAGES):
        colours = draw.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(colours).resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.int16)
        pixels = (smooth + draw.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)
        turns = [{"from": "human", "value": f"<image>\nWhat is in picture {number}?"}, {"from": "gpt", "value": ANSWER}]
        entries.append({"image": f"{number}.jpg", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(entries), encoding="utf8")
    return folder / "data.json"


class Steps:
    """Training steps of one task, each on a micro-batch that it is given."""

    def __init__(self, task: ConversationTask, steps: int):
        self.task, self.steps = task, steps
        self.ahead = task.stage.prefetch + 1
        self.next = 0
        self.optimizer = torch.optim.AdamW([p for p in task.module.parameters() if p.requires_grad], lr=1e-5)
        self.in_memory = [task.batch(step, 0, 1) for step in range(task.epoch())]

    def from_files(self) -> tuple[float, float, float]:
        return self._turn(lambda: self.task.batch(self.next, 0, 1))

    def from_memory(self) -> tuple[float, float, float]:
        return self._turn(lambda: self.in_memory[self.next % len(self.in_memory)])

    def _turn(self, batch: Callable[[], Any]) -> tuple[float, float, float]:
        """Means of a turn's steps: seconds, of those without a micro-batch, and processor seconds."""
        for _ in range(self.ahead):
            self._step(batch())
        waited, began, worked = 0.0, time.perf_counter(), time.process_time()
        for _ in range(self.steps):
            asked = time.perf_counter()
            got = batch()
            waited += time.perf_counter() - asked
            self._step(got)
        took, worked = time.perf_counter() - began, time.process_time() - worked
        return took / self.steps, waited / self.steps, worked / self.steps

    def _step(self, batch: Any) -> None:
        self.optimizer.zero_grad()
        loss, _ = self.task.module(batch, 0)
        loss.backward()
        self.optimizer.step()
        self.next += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/focusllava-tiny")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--samples", type=int, default=4, help="conversations of a micro-batch")
    parser.add_argument("--steps", type=int, default=8, help="of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(pathlib.Path(folder))
        os.environ["FOCUSLLAVA_DATA_CACHE"] = f"{folder}/index"
        stage = {"data": str(data), "max_length": 2048, "processes": options.processes,
                 "prune": {"layers": [1, 2], "thresholds": [0.7, 1.0]}}  # fmt: skip
        raw = {"name": "loading", "steps": 1, "samples_per_worker": options.samples, "output": folder,
               "init_from": options.checkpoint, "cluster": {"dtype": "float32"}, "stage": stage}  # fmt: skip
        task = ConversationTask(build_settings(RunConfig, raw))
        steps = Steps(task, options.steps)
        found = take_turns({"files": steps.from_files, "memory": steps.from_memory}, options.rounds)
        tiles = sum(len(image.pixels_T3HW) for _, batch in steps.in_memory for s in batch for image in s.images)
        task.loader.close()
    seconds, waited, worked = ({name: [turn[n] for turn in turns] for name, turns in found.items()} for n in range(3))
    ratios = {"step": ratio_of(seconds["files"], seconds["memory"]), "cpu": ratio_of(worked["files"], worked["memory"])}
    rows = [(name, *(f"{1e3 * median(of[name]):.0f}" for of in (seconds, waited, worked))) for name in seconds]
    print(f"{tiles / IMAGES:.1f} tiles an image, {options.samples} images a step, {options.processes} processes\n")
    print_table(("from", "ms a step", "waiting for data", "processor ms"), rows)
    for name, (ratio, least, greatest) in ratios.items():
        print(f"files over memory, {name}: {ratio:.3f} ({least:.3f} to {greatest:.3f})")
    if options.out:
        content = {"machine": machine(range(os.cpu_count() or 1)), "processes": options.processes,
                   "samples": options.samples, "seconds": seconds, "waited_s": waited, "processor_s": worked,
                   "files_over_memory": ratios}  # fmt: skip
        write_results("loading", content, options.out)


if __name__ == "__main__":
    main()
