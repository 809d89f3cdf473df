"""Training on workers that this process or another starts by itself, as Ray Train would start them."""

from __future__ import annotations

import os
import pathlib
import shutil
import types

import ray.train
import torch

from training import checkpoints
from training.config import RunConfig, run_folder
from training.trainer import Worker


def start_worker(rank: int, workers: int, store: pathlib.Path) -> None:
    """Makes this process one of the workers, which meet at the file `store`."""
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(workers))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=workers)


def train_without_ray(run: RunConfig, task: tuple[str, str], *, since: pathlib.Path | None = None) -> dict[str, str]:
    """All of a run on this worker, from its start or since a checkpoint; checkpoints go to the run's folder."""
    rank, workers = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def keep(metrics, checkpoint, checkpoint_dir_name, **_):
        shutil.copytree(checkpoint.path, run_folder(run) / checkpoint_dir_name, dirs_exist_ok=True)
        shutil.rmtree(checkpoint.path)

    checkpoint = ray.train.Checkpoint.from_directory(since) if since else None
    ray.train.get_checkpoint, ray.train.report = lambda: checkpoint, keep
    ray.train.get_context = lambda: types.SimpleNamespace(get_local_rank=lambda: rank)
    run_folder(run).mkdir(parents=True, exist_ok=True)
    checkpoints.seed(run.seed)
    return Worker(run, checkpoints.what_it_is_made_of(run), task, rank, workers).train()
