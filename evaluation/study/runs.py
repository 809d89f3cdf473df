"""Trains and scores settings: as many runs at once as there are cores, resumable, within a budget of minutes.

A run is `training/finetune.py` with a configuration of its own, one worker of one thread, on a Ray that all runs share;
then `evaluation.study.scoring` scores what it exported. A result that is there is not made again: its key is a hash of
all that its figures depend on.
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
from evaluation.study.cluster import SharedRay
from evaluation.study.results import Result, load_results, save_result
from evaluation.study.scoring import Job
from evaluation.study.settings import IMAGES_PER_STEP, OPTIMIZER, SETTINGS, STAGE, START, Setting, merged, resolved
from services.checkpoint.store import fingerprint
from services.compute.dtypes import choose_dtype, dtype_name

ROOT = pathlib.Path(__file__).resolve().parents[2]
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
    """Where results go, below `results`."""
    scratch: pathlib.Path
    """Where configurations, logs, training checkpoints and trained weights go."""
    seeds: int = 3
    steps: int = 200
    images: int = 200
    """Images of each split."""
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
    """Config of the training that makes its weights, or made them: RunConfig as YAML has it."""
    weights: pathlib.Path
    keys: dict[PosterSplit, str]

    @property
    def name(self) -> str:
        """Name of its training, and so of the weights; what is only scored has those of another."""
        return self.config["name"]

    def __str__(self) -> str:
        return f"{self.setting.name}, seed {self.seed}"


def conduct(study: Study, settings: Sequence[Setting], *, minutes: float) -> list[str]:
    """Runs what is missing of these settings and seeds, in order, and returns the names of what is left.

    A run is started only if, by those that have finished, it ends within `minutes` from now. Raises RuntimeError naming
    the log of a run that failed, after the others have ended.
    """
    began = time.monotonic()
    waiting = [(setting, seed) for seed in range(study.seeds) for setting in settings]
    running: dict[Future[None], Run] = {}
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
                running[pool.submit(_execute, study, run, ray)] = run
                busy.add(run.weights)
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                if error := future.exception():
                    failures.append(f"{run}: {error}")
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
    trained = setting
    if setting.weights_of and setting.weights_of != START:
        trained = SETTINGS[setting.weights_of]
        if not finished(study, trained, seed, results):
            return None
    versions = study.versions
    config = run_config(study, trained, seed)
    made_of = {name: config[name] for name in ("steps", "seed", "samples_per_worker", "optimizer", "stage")}
    if not trained.selects:
        # Nothing has this learning rate.
        made_of["optimizer"] = {k: v for k, v in config["optimizer"].items() if k != "selector_lr_scale"}
    weights_key = _hash({**made_of, **versions, "trained": setting.weights_of != START})
    config["name"] = f"{trained.name}-seed{seed}-{weights_key}"
    weights = study.scratch / "weights" / config["name"] if setting.weights_of != START else study.start
    config["output"] = str(weights)
    scored: dict[str, Any] = {
        "weights": weights_key,
        "text": setting.text,
        "permuted": setting.permuted,
        "images": study.images,
    }
    if setting.map_share is not None:
        scored["map_share"] = setting.map_share
    if setting.weights_of and setting.stage:
        config["stage"] = merged(config["stage"], setting.stage)
        scored["stage"] = setting.stage
    keys = {split: _hash({**scored, "split": split}) for split in SPLITS}
    return Run(setting=setting, seed=seed, config=config, weights=weights, keys=keys)


def weights_of(study: Study, setting: Setting, seed: int, results: Sequence[Result]) -> pathlib.Path | None:
    """Where a setting's trained weights are once its training has ended; None as long as that is not known."""
    run = planned(study, setting, seed, results)
    return run.weights if run is not None and (run.weights / "config.json").exists() else None


def finished(study: Study, setting: Setting, seed: int, results: Sequence[Result]) -> bool:
    """Whether all of the run's results are there, with its keys."""
    if all(_result(results, setting.name, seed, split) for split in SPLITS):
        run = planned(study, setting, seed, results)
        return run is not None and all(
            found.key == run.keys[split]
            for split in SPLITS
            if (found := _result(results, setting.name, seed, split)) is not None
        )
    return False


def run_config(study: Study, setting: Setting, seed: int) -> dict[str, Any]:
    """The training's configuration, as `training.config.load` reads it."""
    return {
        "name": f"{setting.name}-seed{seed}",
        "steps": study.steps * setting.times,
        "samples_per_worker": IMAGES_PER_STEP,
        "init_from": str(study.start),
        "output": str(study.scratch / "weights" / f"{setting.name}-seed{seed}"),
        "seed": seed,
        "checkpoint_every": 100,
        "log_every": 10,
        "optimizer": {**OPTIMIZER, **setting.optimizer},
        "cluster": {
            "workers": 1,
            "threads_per_worker": 1,
            "cpus_per_worker": 1,
            "dtype": dtype_name(choose_dtype("auto", "cpu")),
            "storage_path": str(study.scratch / "checkpoints"),
        },
        "stage": merged(STAGE, setting.stage),
    }


def expected_minutes(results: Sequence[Result], run: Run) -> float:
    """The mean of like runs that have finished: those that train, by their steps, or those that do not."""
    trains = run.setting.train and not (run.weights / "config.json").exists()
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


def _execute(study: Study, run: Run, ray: SharedRay) -> None:
    log = study.scratch / "logs" / f"{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    minutes_file = log.with_suffix(".minutes")
    if not (run.weights / "config.json").exists():
        config = log.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(run.config), encoding="utf8")
        minutes = _run([sys.executable, "training/finetune.py", "--config", str(config)], log, ray.environment)
        minutes_file.write_text(str(minutes), encoding="utf8")
    own = run.setting.train and log.exists()
    job_file = study.scratch / "logs" / f"{run.setting.name}-seed{run.seed}.job.json"
    scores_file = job_file.with_suffix(".scores")
    job = Job(setting=run.setting, config=run.config, weights=str(run.weights), splits=SPLITS, images=study.images)
    job_file.write_text(job.to_json(), encoding="utf8")
    scoring = [sys.executable, "-m", "evaluation.study.scoring", str(job_file), str(scores_file)]
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
    for split in SPLITS:
        found = {**shared, **scores[split], "split": split, "key": run.keys[split]}
        save_result(study.folder, Result.from_json(json.dumps(found)))


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
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text("utf8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, one thread a run"


def _result(results: Sequence[Result], setting: str, seed: int, split: PosterSplit) -> Result | None:
    return next((r for r in results if (r.setting, r.seed, r.split) == (setting, seed, split)), None)


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
