"""Scores one run in a process of its own: python -m evaluation.study.scoring JOB.json SCORES.json"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

from evaluation.scenes import PosterSplit
from evaluation.study.evaluate import Scores, calibrate, evaluate
from evaluation.study.settings import Setting
from training.config import RunConfig, build
from training.joint_stage import JointTask


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to score, and how."""

    setting: Setting
    config: dict[str, Any]
    """Config of the training that made the weights."""
    weights: str
    """Checkpoint folder."""
    splits: tuple[PosterSplit, ...]
    images: int

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Job:
        raw = json.loads(text)
        setting = {**raw["setting"], "text": tuple(raw["setting"]["text"]) if raw["setting"]["text"] else None}
        return cls(**{**raw, "setting": Setting(**setting), "splits": tuple(raw["splits"])})


def trained_task(config: dict[str, Any], weights: str) -> JointTask:
    """The training's own task, filled with what it exported."""
    stage = {**config["stage"], "fresh_selector": False}
    return JointTask(build(RunConfig, {**config, "init_from": weights, "stage": stage}))


def score(job: Job) -> dict[str, Scores]:
    """Scores by split. The first one is timed, for both."""
    task = trained_task(job.config, job.weights)
    if job.setting.map_share is not None:
        calibrate(task, job.setting.map_share)
    found: dict[str, Scores] = {}
    for split in job.splits:
        scores = evaluate(task, job.setting, split, job.images, timed=not found)
        question_ms = next(iter(found.values())).question_ms if found else scores.question_ms
        found[split] = dataclasses.replace(scores, question_ms=question_ms)
    return found


def main() -> None:
    torch.set_num_threads(1)
    job_file, scores_file = map(pathlib.Path, sys.argv[1:])
    found = score(Job.from_json(job_file.read_text(encoding="utf8")))
    text = json.dumps({split: asdict(scores) for split, scores in found.items()}, indent=1)
    scores_file.write_text(text + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
