"""A run's checkpoints: what each worker writes, what a resumed run may not change, and what a killed run leaves behind.

Ray Train copies every worker's files to the run's folder and names a checkpoint in its list once all have arrived, so
one that is torn is never resumed from. Its list itself is written in place; the copy beside it is for a kill that hits
just then.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
import torch

from services.common.errors import InvalidInput
from training.config import RunConfig

TAG = "state"
LIST, LIST_BEFORE = "checkpoint_manager_snapshot.json", "checkpoint_manager_snapshot.before.json"
PREFIX = "checkpoint_"
FORMAT = 2
"""Another number where a checkpoint has other content, so that an older one is refused by name."""
MAY_CHANGE = {
    *("root", "images"),  # the data's own hash says whether it is the same
    *("processes", "prefetch", "max_bad_share", "gradient_checkpointing", "validation"),
}
"""Settings of a stage that change nothing of what is trained."""


def name_of(step: int) -> str:
    """The folder of the checkpoint after so many steps."""
    return f"{PREFIX}{step:08d}"


def what_it_is_made_of(run: RunConfig) -> dict[str, Any]:
    """What a resumed run may not change, as JSON: another stage or data under an old name is another run."""
    names = ("init_from", "seed", "optimizer", "stage")
    settings = {name: value for name, value in dataclasses.asdict(run).items() if name in names} | {"format": FORMAT}
    settings["stage"] = {name: value for name, value in run.stage.items() if name not in MAY_CHANGE}
    return json.loads(json.dumps(settings))


def check_resumed(name: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises InvalidInput naming what differs between a checkpoint's run and the one that would go on with it."""
    different = [
        f"{field} was {before.get(field)!r}, is {value!r}" for field, value in now.items() if before.get(field) != value
    ]
    if different:
        raise InvalidInput(f"a run of other settings has the name {name!r}: {'; '.join(different)}", field="name")


def check_workers(name: str, before: int, now: int, zero_stage: int) -> None:
    """Raises InvalidInput where shards of another number of workers cannot be read: those of ZeRO 3."""
    if before != now and zero_stage == 3:
        wrong = (
            f"is {now}, and the checkpoints of {name!r} are sharded over {before}: go on with "
            f"cluster.workers={before}, or take another name and init_from=EXPORT to start anew from weights"
        )
        raise InvalidInput(wrong, field="cluster.workers")


def seed(number: int) -> None:
    """Seeds whatever may draw in this process."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)


def random_state() -> dict[str, Any]:
    """This worker's random states."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate(), "numpy": np.random.get_state()}


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])


def save(engine: Any, folder: pathlib.Path, rank: int, client_state: dict[str, Any]) -> None:
    """Writes this worker's shard. `client_state` is the same on all workers."""
    engine.save_checkpoint(str(folder), tag=TAG, client_state=client_state)
    torch.save(random_state(), folder / f"random_{rank}.pt")


def for_any_workers(folder: pathlib.Path, target: pathlib.Path) -> None:
    """Writes a checkpoint's weights and optimizer so that any number of workers can load them: DeepSpeed's universal
    checkpoint."""
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    folders = ["--input_folder", str(folder / TAG), "--output_folder", str(target / TAG)]
    done = subprocess.run([*command, *folders], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{folder} cannot be turned into a universal checkpoint:\n{done.stderr[-2000:]}")


def load(engine: Any, folder: pathlib.Path, rank: int) -> dict[str, Any]:
    """Loads weights, optimizer and this worker's random state; returns what was saved beside them."""
    _, client_state = engine.load_checkpoint(str(folder), tag=TAG)
    if (path := folder / f"random_{rank}.pt").exists():
        set_random_state(torch.load(path, weights_only=False))
    return client_state


def state_of(folder: pathlib.Path) -> dict[str, Any]:
    """What was saved beside the weights, read without loading a shard."""
    path = folder / TAG / "mp_rank_00_model_states.pt"
    if not path.exists():
        path = folder / TAG / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    return torch.load(path, weights_only=False, map_location="cpu", mmap=True)


def scratch(run: RunConfig) -> pathlib.Path:
    """A new folder of this machine's for what a worker writes before it is copied to the run's folder."""
    return pathlib.Path(tempfile.mkdtemp(prefix=_scratch_prefix(run)))


def scratch_of_all(run: RunConfig) -> pathlib.Path:
    """The folder of this machine's that all its workers read a universal checkpoint from."""
    return pathlib.Path(tempfile.gettempdir()) / f"{_scratch_prefix(run)}universal"


def clean_scratch(run: RunConfig) -> None:
    """Removes what killed workers of the same run have left on this machine, before any of the new ones writes."""
    for left in pathlib.Path(tempfile.gettempdir()).glob(f"{_scratch_prefix(run)}*"):
        shutil.rmtree(left, ignore_errors=True)


def _scratch_prefix(run: RunConfig) -> str:
    whose = hashlib.sha256(f"{run.cluster.storage_path}/{run.name}".encode()).hexdigest()[:16]
    return f"focusllava-checkpoint-{whose}-"


def copy_list(run_folder: pathlib.Path) -> None:
    """Keeps a copy of Ray's list before the next checkpoint is added to it."""
    if _reads(source := run_folder / LIST):
        part = run_folder / f"{LIST_BEFORE}.part"
        shutil.copyfile(source, part)
        os.replace(part, run_folder / LIST_BEFORE)


def clean(run_folder: pathlib.Path) -> list[str]:
    """Mends a torn list and removes the checkpoints that never were whole; returns what it did, a line each."""
    lines: list[str] = []
    path, before = run_folder / LIST, run_folder / LIST_BEFORE
    if not run_folder.is_dir():
        return lines
    if path.exists() and not _reads(path):
        path.unlink()
        if _reads(before):
            path.write_text(json.dumps(_without_deleted(json.loads(before.read_text(encoding="utf8")), run_folder)))
        lines.append(f"{path} was torn, its copy takes its place")
    known = {path.name for path in whole(run_folder)}
    for folder in sorted(run_folder.glob(f"{PREFIX}*")):
        if folder.is_dir() and folder.name not in known:
            shutil.rmtree(folder)
            lines.append(f"{folder.name} was not whole, removed")
    return lines


def whole(run_folder: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints that can be resumed from, oldest first."""
    if not _reads(path := run_folder / LIST):
        return []
    listed = json.loads(path.read_text(encoding="utf8"))
    return [run_folder / result["checkpoint_dir_name"] for result in listed["checkpoint_results"]]


def _without_deleted(listed: dict[str, Any], run_folder: pathlib.Path) -> dict[str, Any]:
    """Ray's list without the checkpoints whose folders it has deleted since."""
    pairs = zip(listed["checkpoint_results"], listed["checkpoint_report_indices"], strict=True)
    left = [pair for pair in pairs if (run_folder / pair[0]["checkpoint_dir_name"]).is_dir()]
    results, indices = [result for result, _ in left], [index for _, index in left]
    latest = results[-1] if results else None
    return {
        **listed,
        "checkpoint_results": results,
        "checkpoint_report_indices": indices,
        "latest_checkpoint_result": latest,
    }


def _reads(path: pathlib.Path) -> bool:
    try:
        return "checkpoint_results" in json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError):
        return False
