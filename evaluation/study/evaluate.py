"""Scores a trained run on splits of the benchmark, in the training model: a branch a question, teacher-forced.

    python -m evaluation.study.evaluate JOB.json SCORES.json

A branch is right when every token of its answer, the end included, is the likeliest, which is what greedy decoding
would say. Sampler, pruning and counts are the served model's (tests/unit/evaluation/test_study_evaluate.py).
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from evaluation.scenes import SEEDS, PosterSplit, asked_of
from evaluation.scenes.scoring import GROUPS, Tally
from evaluation.study.results import Scores
from evaluation.study.settings import Setting
from services.common.settings import build_settings
from services.encoder.reading import tiles_of
from services.modeling.pruning import PruneSchedule
from services.sampler.vision_guided import SampledMap
from training.config import RunConfig
from training.data.branches import Exchange, Sample
from training.data.poster_boxes import content_boxes
from training.data.posters import Poster, poster_at, render_poster
from training.data.questions import QuestionAnswer
from training.experiments.branch_controls import BranchControl, regions_touched
from training.experiments.task import ExperimentTask
from training.question_module import Answers

IMAGES_AT_ONCE = 4
TIMED_QUESTIONS = 24


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a process of its own is to score, and how."""

    setting: Setting
    config: dict[str, Any]
    """The configuration of the training that made the weights."""
    weights: str
    """Checkpoint folder."""
    splits: tuple[PosterSplit, ...]
    images: int

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Job:
        raw = json.loads(text)
        setting = {**raw["setting"], "text": tuple(raw["setting"]["text"]) if raw["setting"]["text"] else None}
        return cls(**{**raw, "setting": Setting(**setting), "splits": tuple(raw["splits"])})


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One image of the benchmark with its questions."""

    poster: Poster
    questions: list[QuestionAnswer]
    sample: Sample


def trained_task(config: dict[str, Any], weights: str) -> ExperimentTask:
    """The training's own task, filled with what it exported."""
    stage = {**config["stage"], "fresh_selector": False}
    return ExperimentTask(build_settings(RunConfig, {**config, "init_from": weights, "stage": stage}))


def evaluate(task: ExperimentTask, setting: Setting, split: PosterSplit, images: int, *, timed: bool = True) -> Scores:
    """Scores `task`'s weights as the setting says; the benchmark's own first `images` images and their questions."""
    model = task.module.eval()
    model.schedule = schedule_of(setting)
    if setting.permuted:
        model.branch_control = BranchControl(name="permuted")
    tally = _Tally(task)
    pending: list[Asked] = []
    for number, asked in enumerate(benchmark_samples(task, split, images), start=1):
        pending.append(asked)
        if len(pending) == IMAGES_AT_ONCE or number == images:
            # Named by split and place, so that a control that draws gives every run the same branches.
            answers = model.answer([one.sample for one in pending], random.Random(f"{split}/{number}"))
            tally.add(pending, answers)
            pending = []
    return tally.scores(_question_ms(task, split, min(images, TIMED_QUESTIONS)) if timed else None)


def schedule_of(setting: Setting) -> PruneSchedule | None:
    """The text-guided sampler as the setting evaluates it: nothing is drawn."""
    if setting.text is None:
        return None
    layer, threshold = setting.text
    return PruneSchedule(layers=(layer, layer), thresholds=(threshold, threshold))


def benchmark_samples(task: ExperimentTask, split: PosterSplit, images: int) -> Iterator[Asked]:
    """`evaluation.scenes.benchmark_images` without the detour over files, as samples of the training model."""
    seed = SEEDS[split]
    for index in range(images):
        poster = poster_at(split, seed, index)
        questions = asked_of(poster, split, seed, index)
        built = [task.builder.build(Exchange(question=q.question, answer=q.answer)) for q in questions]
        sample = Sample(
            image=tiles_of(render_poster(poster), task.config),
            prefix_ids=built[0][0],
            branches=tuple(branch for _, branch in built),
            glyph_boxes=content_boxes(poster)["glyph"],
        )
        yield Asked(poster=poster, questions=questions, sample=sample)


class _Tally:
    def __init__(self, task: ExperimentTask) -> None:
        self.window = task.config.vision_sampler.window
        self.branches = len(task.config.vision_sampler.branches)
        self.right: dict[str, list[bool]] = defaultdict(list)
        self.counts: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(self.branches))
        self.uncompressed = self.sampled = self.kept = self.converted = 0.0
        self.map_tokens = self.map_cells = 0

    def add(self, pending: list[Asked], answers: Answers) -> None:
        scored = iter(zip(answers.exact_Q.tolist(), answers.tokens_QL.tolist(), strict=True))
        for asked, encoded in zip(pending, answers.encoded, strict=True):
            for question in asked.questions:
                exact, seen_L = next(scored)
                groups = [name for name, kinds in GROUPS.items() if question.kind in kinds]
                for name in ("all", question.kind, *groups):
                    self.right[name].append(exact)
                self.uncompressed += encoded.uncompressed_tokens
                self.sampled += len(encoded.tokens_ND)
                self.kept += seen_L[-1]
                self.converted += statistics.fmean(seen_L)
            height, width = encoded.map_hw
            self.map_cells += height * width
            self.map_tokens += encoded.map_tokens
            if encoded.sampled is not None:
                self._count_regions(asked.poster, encoded.sampled, encoded.map_hw)

    def _count_regions(self, poster: Poster, sampled: SampledMap, map_hw: tuple[int, int]) -> None:
        rest_M = torch.ones(len(sampled.branch_ids_M), dtype=torch.bool)
        members = {"all": rest_M}
        for kind, boxes in content_boxes(poster).items():
            members[kind] = regions_touched(boxes, map_hw, self.window, sampled.region_grid) & rest_M
            rest_M = rest_M & ~members[kind]
        members["empty"] = rest_M
        for name, member_M in members.items():
            self.counts[name] += torch.bincount(sampled.branch_ids_M[member_M], minlength=self.branches)

    def scores(self, question_ms: float | None) -> Scores:
        def percent(count: float, of: float) -> float:
            return round(100 * count / of, 2)

        counted = {kind: count / count.sum() for kind, count in self.counts.items() if count.sum()}
        shares = {kind: [round(float(share), 4) for share in of_kind] for kind, of_kind in counted.items()}
        return Scores(
            exact={name: Tally(right=sum(hits), asked=len(hits)) for name, hits in sorted(self.right.items())},
            sampled_percent=percent(self.sampled, self.uncompressed),
            kept_percent=percent(self.kept, self.uncompressed),
            converted_percent=percent(self.converted, self.uncompressed),
            map_percent=percent(self.map_tokens, self.map_cells),
            branch_shares=shares,
            question_ms=question_ms,
        )


def _question_ms(task: ExperimentTask, split: PosterSplit, questions: int) -> float:
    """Median milliseconds from pixels to the answer's first token, one image and one question at a time."""
    taken = []
    for asked in benchmark_samples(task, split, questions + 1):
        alone = dataclasses.replace(asked.sample, branches=asked.sample.branches[:1])
        began = time.perf_counter()
        task.module.answer([alone], random.Random(0))
        taken.append(1000 * (time.perf_counter() - began))
    # The first one warms up.
    return round(statistics.median(taken[1:]), 1)


def main() -> None:
    torch.set_num_threads(1)
    job_file, scores_file = map(pathlib.Path, sys.argv[1:])
    job = Job.from_json(job_file.read_text(encoding="utf8"))
    task = trained_task(job.config, job.weights)
    found: dict[str, Scores] = {}
    for split in job.splits:
        scores = evaluate(task, job.setting, split, job.images, timed=not found)
        # The first split is timed, for all.
        question_ms = next(iter(found.values())).question_ms if found else scores.question_ms
        found[split] = dataclasses.replace(scores, question_ms=question_ms)
    text = json.dumps({split: dataclasses.asdict(scores) for split, scores in found.items()}, indent=1)
    scores_file.write_text(text + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
