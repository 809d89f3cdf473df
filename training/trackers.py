"""Where a run's values go besides its log: TensorBoard's files, MLflow, Weights & Biases.

MLflow and W&B read their own environment variables (MLFLOW_TRACKING_URI, WANDB_MODE and the like). A resumed run goes
on in the tracker's run that its checkpoint names.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Protocol

from services.common.errors import InvalidInput
from training.config import RunConfig

PROJECT = "focusllava"
"""MLflow's experiment and W&B's project where the environment names none."""


class Tracker(Protocol):
    """One place that values are written to, by the first worker."""

    id: str
    """What the tracker calls this run; empty where it needs no name."""

    def write(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder."""

    id = ""

    def __init__(self, run: RunConfig, folder: pathlib.Path, start: int, known: str):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class MLflow:
    """A run of an MLflow server, or of mlflow.db beside the run's folder where MLFLOW_TRACKING_URI is not set."""

    def __init__(self, run: RunConfig, folder: pathlib.Path, start: int, known: str):
        self._mlflow = mlflow = _library("mlflow")
        mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.parent / 'mlflow.db'}")
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        self.id = mlflow.start_run(run_id=known or None, run_name=None if known else run.name).info.run_id
        if not known:
            mlflow.log_params({name: json.dumps(value) for name, value in dataclasses.asdict(run).items()})

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class WandB:
    """A run of Weights & Biases. Offline, its files lie in the run's folder."""

    def __init__(self, run: RunConfig, folder: pathlib.Path, start: int, known: str):
        wandb = _library("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            dir=folder,
            id=known or None,
            resume="allow",
            config=dataclasses.asdict(run),
            settings=wandb.Settings(console="off"),
        )
        self.id = self._run.id

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, type[Any]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}
"""Trackers by their names in `report_to`."""


class Trackers:
    """All trackers of a run. One that fails while the run goes on is left out with a warning."""

    def __init__(self, run: RunConfig, folder: pathlib.Path, start: int, known: Mapping[str, str]):
        """known: what each tracker calls the run, where a checkpoint says so.

        Raises InvalidInput for a tracker that is not installed, or that does not take the run.
        """
        self.ids = dict(known)
        """What each tracker calls the run; a checkpoint keeps it."""
        self._open: dict[str, Tracker] = {}
        for name in run.report_to:
            try:
                tracker = self._open[name] = TRACKERS[name](run, folder, start, known.get(name, ""))
                self.ids[name] = tracker.id
            except InvalidInput:
                raise
            except Exception as error:  # each library has its own
                raise InvalidInput(f"{name} cannot be written to: {error}", field="report_to") from None

    def write(self, values: Mapping[str, float], step: int) -> None:
        for name, tracker in list(self._open.items()):
            try:
                tracker.write(values, step)
            except Exception as error:  # a server that is gone is no reason to end a run of days
                del self._open[name]
                print(f"warning: {name} is no longer written to: {error}", flush=True)

    def close(self) -> None:
        for tracker in self._open.values():
            tracker.close()


def _library(name: str) -> ModuleType:
    try:
        return __import__(name)
    except ImportError:
        raise InvalidInput(f"{name} is not installed: pip install 'focusllava[{name}]'", field="report_to") from None
