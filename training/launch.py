"""A stage's command: reads the configuration, lets Ray Train place the workers, and says how the run ended."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
import signal
import sys
from typing import Any, NoReturn

import ray
import ray.train
from ray.train.torch import TorchTrainer

from services.common.errors import InvalidInput
from training import checkpoints
from training.config import REFUSED, STOPPED, RunConfig, load, run_folder
from training.global_batch import accumulation
from training.own_ray import start_ray
from training.running import the_only_command
from training.watched import Ended, in_a_child

DONE, LOST, WRONG, DIVERGED = 0, 1, 2, 3
"""Exit codes: done; the same command goes on; the settings are wrong; the loss is, as the message says."""

Named = tuple[str, str]
"""A Task by its module and class."""


def main(task: Named, description: str, *, on_conversations: Named | None = None) -> None:
    """The command line of a stage: `python training/<stage>.py --config FILE [--set name=value ...]`.

    on_conversations: the task where the stage's data is a file, a folder or a mixture, and not a generator's name.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="replaces one value")
    arguments = parser.parse_args()
    try:
        run = load(arguments.config, arguments.set)
        accumulation(run, run.cluster.workers)
    except (InvalidInput, OSError) as error:
        end(WRONG, f"{arguments.config}: {error}")
    if on_conversations and is_path(run.stage.get("data")):
        task = on_conversations
    made_of = checkpoints.what_it_is_made_of(run)
    run = absolute(run)
    if run.init_from and "://" not in run.init_from and not pathlib.Path(run.init_from).exists():
        end(WRONG, f"init_from: {run.init_from} does not exist; run the stage before, or --set init_from=FOLDER")
    # Ray ends the process that speaks with it once its GCS is lost: this one is left to say so.
    ended = in_a_child(lambda: train(run, task, made_of, arguments.config), leave=ray.shutdown)
    if isinstance(ended, int):
        how = f"by {signal.Signals(-ended).name}" if ended < 0 else f"with exit code {ended}"
        ended = LOST, f"{run.name} ended: its connection to Ray was lost, {how} (what Ray says of it stands above)"
    code, message = ended
    end(code, f"{message}\nThe same command goes on from the last checkpoint." if code == LOST else message)


def train(run: RunConfig, task: Named, made_of: dict[str, Any], config: str) -> Ended:
    """Trains from the last checkpoint on; the exit code, and what to say."""
    folder = run_folder(run)
    try:
        with the_only_command(folder) if folder else contextlib.nullcontext():
            start_ray()
            for line in checkpoints.clean(folder) if folder else ():
                print(line, flush=True)
            result = trainer(run, task, made_of).fit()
    except InvalidInput as error:
        return WRONG, str(error)
    except Exception as error:  # Ray has many; none is the user's mistake
        return LOST, f"{run.name} ended: {error}"
    except (KeyboardInterrupt, SystemExit):  # Ray makes the second of SIGTERM
        return LOST, f"{run.name} was interrupted"
    if result.error:  # InvalidInput: one worker's, in the middle of the run
        return WRONG if "InvalidInput" in str(result.error) else LOST, f"{run.name} ended: {result.error}"
    ended: dict[str, str] = getattr(result, "return_value", None) or {}
    if REFUSED in ended:
        return WRONG, f"{config}: {ended[REFUSED]}"
    if STOPPED in ended:
        return DIVERGED, f"{run.name} stopped: {ended[STOPPED]}"
    return DONE, ""


def trainer(run: RunConfig, task: tuple[str, str], made_of: dict[str, Any]) -> TorchTrainer:
    """Ray Train's trainer of the run."""
    cluster = run.cluster
    return TorchTrainer(
        work,  # type: ignore[arg-type]  # what it returns is Result.return_value
        train_loop_config={"run": run, "task": task, "made_of": made_of},
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=cluster.use_gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if cluster.use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=run.name,
            storage_path=cluster.storage_path,
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=run.checkpoints_kept),
            # Ray Train's own copy of what workers print would show every progress line twice.
            worker_runtime_env={"env_vars": {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}},  # type: ignore[call-arg]
        ),
    )


def work(payload: dict[str, Any]) -> dict[str, str]:
    """What each worker runs. The model's code, which takes seconds to import, is imported by the workers alone."""
    from training.trainer import train_worker

    return train_worker(payload)


def end(code: int, message: str) -> NoReturn:
    """Ends the command with its exit code and its last message, which may be empty."""
    print(message, end="\n" if message else "", file=sys.stderr, flush=True)
    raise SystemExit(code)


def is_path(data: Any) -> bool:
    """Whether a stage's data is a file, and not the name of a generator."""
    return isinstance(data, str) and ("/" in data or bool(pathlib.Path(data).suffix))


def absolute(run: RunConfig) -> RunConfig:
    """The run with absolute paths: workers run in other folders, and a path is meant from here."""

    def from_here(path: str) -> str:
        return path if not path or "://" in path else str(pathlib.Path(path).expanduser().resolve())

    cluster = dataclasses.replace(run.cluster, storage_path=from_here(run.cluster.storage_path))
    stage = dict(run.stage)
    for name in ("data", "root", "images"):
        if isinstance(path := stage.get(name), str) and (name != "data" or is_path(path)):
            stage[name] = from_here(path)
    if isinstance(held_out := stage.get("validation"), dict):
        stage["validation"] = {k: from_here(v) if k in ("data", "images") else v for k, v in held_out.items()}
    return dataclasses.replace(
        run, output=from_here(run.output), init_from=from_here(run.init_from), cluster=cluster, stage=stage
    )
