"""Trains and scores settings: as many runs at once as there are cores, resumable, within a budget of minutes.

A run is `training/finetune.py` with a configuration of its own, one worker of one thread, on a Ray that all runs share;
then `evaluation.study.evaluate` scores what it exported. A result that is there is not made again: its key is a hash
of all that its figures depend on.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import yaml

from evaluation.scenes import PosterSplit, benchmark_version
from evaluation.study.cluster import ROOT, SharedRay
from evaluation.study.evaluate import Job
from evaluation.study.results import Result, load_results, save_results
from evaluation.study.settings import SETTINGS, STUDY, Setting, merged, resolved
from services.checkpoint.store import fingerprint
from services.compute.dtypes import choose_dtype, dtype_name

SPLITS: tuple[PosterSplit, ...] = ("validation", "test")
FIRST_GUESS_MINUTES = 6.0
"""What a training run is taken to need before one has finished."""
PROGRESS = re.compile(r" (\d+)/\d+  ((?:[a-z_0-9]+ -?[\d.]+  )+)")


@dataclass(frozen=True, kw_only=True)
class Study:
    """What all runs share."""

    start: pathlib.Path
    """The checkpoint that every run starts from."""
    folder: pathlib.Path
    """Where results and the page go."""
    scratch: pathlib.Path
    """Where configurations, logs, training checkpoints and trained weights go."""
    seeds: int = 3
    steps: int = 200
    images: int = 200
    """Images scored of each split."""
    cores: int = os.cpu_count() or 1

    @cached_property
    def versions(self) -> dict[str, str]:
        return {"data": benchmark_version(), "start": fingerprint(self.start)}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A setting with a seed, its budget filled in."""

    setting: Setting
    seed: int
    config: dict[str, Any]
    """The configuration of the training that makes its weights, or made them: RunConfig as YAML has it."""
    weights: pathlib.Path
    keys: dict[PosterSplit, str]

    @property
    def name(self) -> str:
        """The name of its training, and so of the weights; what is only scored has those of another."""
        return self.config["name"]

    @property
    def trained(self) -> bool:
        """Whether its weights are there."""
        return (self.weights / "config.json").exists()

    def __str__(self) -> str:
        return f"{self.setting.name}, seed {self.seed}"


def conduct(study: Study, settings: Sequence[Setting], *, minutes: float) -> list[str]:
    """Runs what is missing of these settings and seeds, in order, and returns the names of what is left.

    A run is started only if, by those that have finished, it ends within `minutes` from now. Raises RuntimeError naming
    the log of a run that failed, after the others have ended.
    """
    began = time.monotonic()
    waiting = [(setting, seed) for seed in range(study.seeds) for setting in settings]
    running: dict[Future[list[Result]], Run] = {}
    failures: list[str] = []
    with ThreadPoolExecutor(study.cores) as pool, SharedRay(study.cores) as ray:
        while True:
            results = load_results(study.folder)
            waiting = [pair for pair in waiting if not finished(study, *pair, results)]
            busy = {run.weights for run in running.values()}
            for setting, seed in list(waiting):
                if len(running) == study.cores or failures:
                    break
                run = planned(study, setting, seed, results)
                if run is None or run.weights in busy:
                    continue
                spent = (time.monotonic() - began) / 60
                if spent + expected_minutes(results, run) > minutes:
                    continue
                print(f"{run}: started after {spent:.0f} min", flush=True)
                waiting.remove((setting, seed))
                environment = {} if run.trained else ray.environment
                running[pool.submit(_execute, study, run, environment)] = run
                busy.add(run.weights)
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                if error := future.exception():
                    failures.append(f"{run}: {error}")
                else:
                    save_results(study.folder, future.result())
                print(f"{run}: {error or 'done'}", flush=True)
    if failures:
        raise RuntimeError("; ".join(failures))
    return [f"{setting.name}, seed {seed}" for setting, seed in waiting]


def planned(study: Study, setting: Setting, seed: int, results: Sequence[Result]) -> Run | None:
    """The run, or None as long as another's result is needed for it."""
    if setting.match:
        found = _result(results, setting.match, seed, "validation")
        if found is None or not finished(study, SETTINGS[setting.match], seed, results):
            return None
        setting = resolved(setting, found.branch_shares.get("all", ()), found.converted_percent)
    trained = SETTINGS[setting.weights_of] if setting.weights_of else setting
    if setting.weights_of and not finished(study, trained, seed, results):
        return None
    config = run_config(study, trained, seed)
    made_of = {name: config[name] for name in ("steps", "seed", "samples_per_worker", "optimizer", "stage")}
    if not trained.selects:
        # Nothing has this learning rate.
        made_of["optimizer"] = {k: v for k, v in config["optimizer"].items() if k != "selector_lr_scale"}
    weights_key = _hash({**made_of, **study.versions, "trained": True})
    config["name"] = f"{trained.name}-seed{seed}-{weights_key}"
    weights = study.scratch / "weights" / config["name"]
    config["output"] = str(weights)
    scored: dict[str, Any] = {"weights": weights_key, "text": setting.text}
    scored |= {"permuted": setting.permuted, "images": study.images}
    if setting.weights_of and setting.stage:
        config["stage"] = merged(config["stage"], setting.stage)
        scored["stage"] = setting.stage
    keys = {split: _hash({**scored, "split": split}) for split in SPLITS}
    return Run(setting=setting, seed=seed, config=config, weights=weights, keys=keys)


def weights_of(study: Study, setting: Setting, seed: int, results: Sequence[Result]) -> pathlib.Path | None:
    """Where a setting's trained weights are once its training has ended; None as long as that is not known."""
    run = planned(study, setting, seed, results)
    return run.weights if run is not None and run.trained else None


def finished(study: Study, setting: Setting, seed: int, results: Sequence[Result]) -> bool:
    """Whether all of the run's results are there, with its keys."""
    keys = {split: found.key for split in SPLITS if (found := _result(results, setting.name, seed, split))}
    run = planned(study, setting, seed, results) if len(keys) == len(SPLITS) else None
    return run is not None and keys == run.keys


def run_config(study: Study, setting: Setting, seed: int) -> dict[str, Any]:
    """The training's configuration, as `training.config.load` reads it."""
    name = f"{setting.name}-seed{seed}"
    dtype = dtype_name(choose_dtype("auto", "cpu"))
    own = {
        "name": name,
        "steps": study.steps,
        "init_from": str(study.start),
        "output": str(study.scratch / "weights" / name),
        "seed": seed,
        "cluster": {"dtype": dtype, "storage_path": str(study.scratch / "checkpoints")},
        "stage": setting.stage,
    }
    return merged(STUDY["run"], own)


def expected_minutes(results: Sequence[Result], run: Run) -> float:
    """The mean of like runs that have finished: those that train, by their steps, or those that do not."""
    trains = run.setting.train and not run.trained
    like = {
        (found.setting, found.seed): found.minutes * (run.config["steps"] / found.steps if trains else 1)
        for found in results
        if found.setting in SETTINGS and SETTINGS[found.setting].train == trains
    }
    if like:
        return statistics.fmean(like.values())
    return FIRST_GUESS_MINUTES if trains else FIRST_GUESS_MINUTES / 4


def read_history(log: str) -> list[dict[str, float]]:
    """The progress lines of a training log, one entry a step; what a resumed run printed again stands once."""
    found: dict[int, dict[str, float]] = {}
    for step, values in PROGRESS.findall(log):
        numbers = re.findall(r"([a-z_0-9]+) (-?[\d.]+)  ", values)
        found[int(step)] = {"step": float(step), **{name: float(value) for name, value in numbers}}
    return [found[step] for step in sorted(found)]


def _execute(study: Study, run: Run, environment: Mapping[str, str]) -> list[Result]:
    """Trains where the weights are not there, and scores: a result a split."""
    log = study.scratch / "logs" / f"{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    minutes_file = log.with_suffix(".minutes")
    if not run.trained:
        config = log.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(run.config), encoding="utf8")
        minutes = _run([sys.executable, "training/finetune.py", "--config", str(config)], log, environment)
        minutes_file.write_text(str(minutes), encoding="utf8")
    own = run.setting.train and log.exists()
    job_file = study.scratch / "logs" / f"{run.setting.name}-seed{run.seed}.job.json"
    scores_file = job_file.with_suffix(".scores")
    job = Job(setting=run.setting, config=run.config, weights=str(run.weights), splits=SPLITS, images=study.images)
    job_file.write_text(job.to_json(), encoding="utf8")
    scoring = [sys.executable, "-m", "evaluation.study.evaluate", str(job_file), str(scores_file)]
    minutes = _run(scoring, job_file.with_suffix(".log"), {})
    if own and minutes_file.exists():
        minutes += float(minutes_file.read_text(encoding="utf8"))
    scores = json.loads(scores_file.read_text(encoding="utf8"))
    shared = {
        "setting": run.setting.name,
        "seed": run.seed,
        "steps": run.config["steps"],
        "images": study.images,
        "history": read_history(log.read_text(encoding="utf8", errors="replace")) if own else [],
        "minutes": round(minutes, 2),
        "commit": commit(),
        "hardware": hardware(),
        "dtype": run.config["cluster"]["dtype"],
        **study.versions,
    }
    return [
        Result.from_json(json.dumps({**shared, **scores[split], "split": split, "key": run.keys[split]}))
        for split in SPLITS
    ]


def _run(command: list[str], log: pathlib.Path, variables: Mapping[str, str]) -> float:
    """Minutes that it took. Raises RuntimeError naming the log of a command that failed."""
    began = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    with log.open("ab") as out:
        code = subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment
        ).returncode
    if code:
        raise RuntimeError(f"ended with status {code}, see {log}")
    return (time.monotonic() - began) / 60


def commit() -> str:
    """Twelve digits of the program's commit, "+" after them when tracked files differ; "unknown" without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD")[:12] + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def hardware() -> str:
    """Processor and number of cores."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text("utf8")) if cpuinfo.exists() else []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, one thread a run"


def _result(results: Sequence[Result], setting: str, seed: int, split: PosterSplit) -> Result | None:
    return next((r for r in results if (r.setting, r.seed, r.split) == (setting, seed, split)), None)


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
