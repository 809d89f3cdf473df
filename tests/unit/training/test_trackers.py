"""A run's values reach MLflow and W&B as they are configured, a resumed run's the same run of theirs.

Both are real and on this machine; a test is skipped where its package is missing (`make trackers` brings both).
"""

import dataclasses

import pytest

from services.common.errors import InvalidInput
from tests.tiny_training import tiny_run
from training.trackers import TRACKERS, Trackers


def run_of(*names):
    return dataclasses.replace(tiny_run("o", name="n"), report_to=names)


def write_in_two_parts(folder, name):
    """Steps 1 and 2, and after a kill step 2 again and 3; returns what the tracker calls the run."""
    first = Trackers(run_of(name), folder, 0, {})
    first.write({"train/loss": 4.0, "train/rate": 1e-3}, 1)
    first.write({"train/loss": 3.0}, 2)
    first.close()
    resumed = Trackers(run_of(name), folder, 1, first.ids)
    resumed.write({"train/loss": 3.0}, 2)
    resumed.write({"train/loss": 2.0}, 3)
    resumed.close()
    assert resumed.ids == first.ids
    return first.ids[name]


def test_mlflow_has_one_run_of_a_killed_and_resumed_one(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "n").mkdir()
    run_id = write_in_two_parts(tmp_path / "n", "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("focusllava").experiment_id])
    assert run.info.run_id == run_id and run.info.run_name == "n" and run.info.status == "FINISHED"
    assert run.data.params["samples_per_worker"] == "2" and run.data.metrics["train/rate"] == 1e-3
    assert {(m.step, m.value) for m in client.get_metric_history(run_id, "train/loss")} == {(1, 4), (2, 3), (3, 2)}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://x")
    with pytest.raises(InvalidInput, match="report_to: mlflow cannot be written to: .*nonsense"):
        Trackers(run_of("mlflow"), tmp_path, 0, {})


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_id = write_in_two_parts(tmp_path, "wandb")
    parts = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(parts) == 2 and all(part.name.endswith(f"-{run_id}") and list(part.glob("*.wandb")) for part in parts)


def test_what_is_not_installed_is_named_with_what_installs_it(tmp_path, monkeypatch):
    for name in ("mlflow", "wandb"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
        with pytest.raises(InvalidInput, match=rf"report_to: {name} is not installed: pip install .focusllava\[{name}"):
            Trackers(run_of(name), tmp_path, 0, {})


def test_a_tracker_that_fails_while_the_run_goes_on_is_left_out(tmp_path, monkeypatch, capsys):
    class Failing(TRACKERS["tensorboard"]):
        def write(self, values, step):
            raise OSError("the disk is full")

    monkeypatch.setitem(TRACKERS, "wandb", Failing)
    trackers = Trackers(run_of("wandb", "tensorboard"), tmp_path, 0, {})
    for step in (1, 2):
        trackers.write({"train/loss": 1.0}, step)
    assert capsys.readouterr().out == "warning: wandb is no longer written to: the disk is full\n"
    trackers.close()
