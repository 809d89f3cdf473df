"""The training loop on one worker: micro-batches to a step, DeepSpeed's ZeRO shards, checkpoints, the log.

A stage supplies a Task (`training/task.py`); this file knows nothing of images or language. `training/launch.py` places
the workers.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import pathlib
import time
from typing import Any

import ray.train
import ray.util.metrics
import torch
from ray.train import CheckpointUploadMode
from torch import nn

from services.common.errors import InvalidInput
from services.common.telemetry import Metrics
from services.compute.dtypes import choose_dtype, dtype_name
from services.compute.malloc import keep_freed_memory
from services.compute.processor import cpu_has_bfloat16
from training import checkpoints
from training.config import REFUSED, STOPPED, ClusterConfig, RunConfig, run_folder
from training.global_batch import Totals, accumulation, mean_over_workers, sum_counts, to_device
from training.optimizer import deepspeed_config, parameter_groups, set_rates
from training.running import begin_worker
from training.task import Task
from training.watching import LossGuard, Watch


def agreed_dtype(cluster: ClusterConfig) -> torch.dtype:
    """`cluster.dtype`, where "auto" is what every worker's processor is made for. Called by all workers at once."""
    if cluster.dtype != "auto" or cluster.use_gpu:
        return choose_dtype(cluster.dtype, "cuda")
    everywhere = torch.tensor(int(cpu_has_bfloat16()))
    torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN)
    return torch.bfloat16 if everywhere else torch.float32


def train_worker(payload: dict[str, Any]) -> dict[str, str]:
    """Runs in each Ray Train worker. Returns why the run ended where it is REFUSED or STOPPED, else nothing."""
    run: RunConfig = payload["run"]
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if run.cluster.use_gpu else "cpu")
    torch.set_num_threads(run.cluster.threads_per_worker)
    if not run.cluster.use_gpu:
        keep_freed_memory()
    if folder := run_folder(run):
        begin_worker(folder)
    checkpoints.seed(run.seed)
    context = ray.train.get_context()
    worker, refused = None, ""
    try:
        worker = Worker(run, payload["made_of"], payload["task"], context.get_world_rank(), context.get_world_size())
    except InvalidInput as error:
        refused = str(error)
    reasons: list[Any] = [None] * context.get_world_size()
    torch.distributed.all_gather_object(reasons, refused)
    if reason := next((reason for reason in reasons if reason), ""):
        return {REFUSED: reason}
    assert worker is not None
    return worker.train()


class Worker:
    """One worker's task, engine and position."""

    def __init__(self, run: RunConfig, made_of: dict[str, Any], task: tuple[str, str], rank: int, workers: int):
        self.rank, self.workers = rank, workers
        if ray.train.get_context().get_local_rank() == 0:
            checkpoints.clean_scratch(run)
        self.accumulation = accumulation(run, workers)
        module_name, class_name = task
        dtype = agreed_dtype(run.cluster)
        self.task: Task = getattr(importlib.import_module(module_name), class_name)(run)
        self.run = run = with_steps(run, self.task)
        batch = run.samples_per_worker * self.accumulation * workers
        self.made_of = {**made_of, "data": self.task.identity(), "global_batch": batch}
        self.guard = LossGuard(run)
        if rank == 0:
            print(f"{run.name}: {workers} worker(s), {dtype_name(dtype)}", flush=True)
        state: dict[str, Any] = {}
        if checkpoint := ray.train.get_checkpoint():
            with checkpoint.as_directory() as folder:
                state = self._resume(pathlib.Path(folder), dtype)
        else:
            self.engine = start_engine(self.task.module, run, dtype, self.accumulation)
        self.start = int(state.get("step", 0))
        self.best = float(state.get("best", math.inf))
        """The lowest validation loss so far."""
        self.watch = Watch(
            run,
            rank=rank,
            micro_batches=self.accumulation * workers,
            start=self.start,
            folder=run_folder(run),
            metrics=Metrics("training", ray.util.metrics),
            state=state.get("watch"),
        )
        if state:
            self.guard.load(state["guard"])
            self.task.load(state["task"])

    def _resume(self, folder: pathlib.Path, dtype: torch.dtype) -> dict[str, Any]:
        """Starts the engine from a checkpoint; returns what was saved beside weights and optimizer."""
        run, before = self.run, checkpoints.state_of(folder)
        checkpoints.check_resumed(run.name, before["made_of"], self.made_of)
        checkpoints.check_workers(run.name, before["workers"], self.workers, run.cluster.zero_stage)
        others = before["workers"] != self.workers
        self.engine = start_engine(self.task.module, run, dtype, self.accumulation, universal=others)
        if others:
            target = checkpoints.scratch_of_all(run)
            if ray.train.get_context().get_local_rank() == 0:
                checkpoints.for_any_workers(folder, target)
            torch.distributed.barrier()
            folder = target
        state = checkpoints.load(self.engine, folder, self.rank)
        gather_small(self.engine)
        if self.rank == 0:
            print(f"resumed at step {state['step']} of {run.steps}", flush=True)
        return state

    def train(self) -> dict[str, str]:
        """All steps from the start on, checkpoints among them, and the export."""
        run = self.run
        for step in range(self.start, run.steps):
            if step not in run.skip_steps and (wrong := self._step(step)):
                return {STOPPED: self._advice(step, wrong)}
            done = step + 1
            logs, saves = done % run.log_every == 0, done % run.checkpoint_every == 0
            if logs or saves or done == run.steps:
                self.watch.flush()
            if self.rank == 0 and (logs or done == run.steps):
                self.watch.log(done)
            if run.validate_every and (done % run.validate_every == 0 or done == run.steps):
                self._validate(done)
            if saves or done == run.steps:
                self._save(done)
        self._export(run.output)
        self.watch.close()
        self.task.close()
        return {}

    def _step(self, step: int) -> str:
        """One step of the optimizer; returns what is wrong with the loss, before it is saved, or nothing."""
        places, engine = self.accumulation * self.workers, self.engine
        began = time.perf_counter()
        batches = [self.task.batch(step, n * self.workers + self.rank, places) for n in range(self.accumulation)]
        waited = time.perf_counter() - began
        batches = [to_device(batch, engine.device) for batch in batches]
        totals: Totals | None = None
        if places > 1:
            counts = [self.task.count(batch, step) for batch in batches]
            counted = [count for count in counts if count is not None]
            totals = sum_counts(counted, places, engine.device) if counted else None
        rates = set_rates(engine.optimizer.param_groups, self.run, step)
        losses, measured = [], []
        for batch in batches:
            loss, metrics = engine(batch, step) if totals is None else engine(batch, step, totals)
            losses.append(float(loss.detach()))
            measured.append(metrics)
            engine.backward(loss)
            if batch is batches[-1]:
                (whole,) = mean_over_workers([sum(losses) / len(losses)], engine.device)
                if wrong := self.guard.check(whole):
                    return wrong
            engine.step()
        norm = float(engine.get_global_grad_norm() or 0.0)
        if not math.isfinite(norm):
            return f"the gradient's norm is {norm}"
        of_step = {"loss": whole, "gradient_norm": norm, **{f"rate_{part}": rate for part, rate in rates.items()}}
        self.watch.add(step, measured, of_step, waited)
        return ""

    def _validate(self, done: int) -> None:
        """Looks at the held-out data, and exports weights that are better on it than all before."""
        self.engine.module.eval()
        found = self.task.validate(done)
        self.engine.module.train()
        if self.rank == 0 and found:
            print(f"{self.run.name} {done}  " + "  ".join(f"{k} {v:.4f}" for k, v in found.items()), flush=True)
            self.watch.write("validation", found, done)
        if found.get("validation_loss", math.inf) < self.best:
            self.best = found["validation_loss"]
            self._export(f"{self.run.output}-best")

    def _export(self, folder: str) -> None:
        """Writes the served format."""
        self.task.export(pathlib.Path(folder))
        if self.rank == 0:
            print(f"exported to {folder}", flush=True)
        torch.distributed.barrier()

    def _save(self, done: int) -> None:
        """Writes a checkpoint, which Ray copies to the run's folder while training goes on."""
        folder = checkpoints.scratch(self.run)
        state = {
            "step": done,
            "workers": self.workers,
            "best": self.best,
            "made_of": self.made_of,
            "guard": self.guard.state(),
            "watch": self.watch.state(),
            "task": self.task.state(),
        }
        checkpoints.save(self.engine, folder, self.rank, state)
        if self.rank == 0 and (kept := run_folder(self.run)):
            checkpoints.copy_list(kept)
        ray.train.report(
            {"step": done, **self.watch.means},
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=checkpoints.name_of(done),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )

    def _advice(self, step: int, wrong: str) -> str:
        kept = run_folder(self.run)
        whole = checkpoints.whole(kept) if kept else []
        last = f"the last good checkpoint is {whole[-1]}" if whole else "there is no checkpoint yet"
        return (
            f"step {step}: {wrong}. Nothing of the step was kept; {last}. The same command with "
            f"--set skip_steps=[{step}] goes on from it without this step's data; with a lower "
            "optimizer.learning_rate, take another name"
        )


def with_steps(run: RunConfig, task: Task) -> RunConfig:
    """The run with its steps, where it says epochs. Raises InvalidInput for a task whose data has no end."""
    if not run.epochs:
        return run
    if not (epoch := task.epoch()):
        raise InvalidInput("is for data that has an end, give steps", field="epochs")
    return dataclasses.replace(run, steps=math.ceil(run.epochs * epoch), epochs=0.0)


def start_engine(
    module: nn.Module, run: RunConfig, dtype: torch.dtype, accumulate: int, *, universal: bool = False
) -> Any:
    """DeepSpeed's engine around the module, whose buffers keep their dtype.

    universal: what it will load is a universal checkpoint.
    """
    import deepspeed

    # Compiled at each worker's start for inference alone, it would leave a lock where a kill hits just then, and every
    # later start would wait for it without end.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    groups = parameter_groups(module, run)
    config = {**deepspeed_config(run, dtype, accumulate), "checkpoint": {"load_universal": universal}}
    engine, *_ = deepspeed.initialize(model=module, model_parameters=groups, config=config)
    for name, buffer in buffers.items():
        # DeepSpeed casts buffers too: rotary frequencies in bf16 would turn far tokens by radians.
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, buffer.to(engine.device))
    gather_small(engine)
    return engine


def gather_small(engine: Any) -> None:
    """Makes small weights whole that ZeRO-3 leaves whole between steps: from the first one on. What is read outside of
    its module's forward pass, as `image_newline`, is one of them. Called by all workers at once."""
    if small := getattr(engine.optimizer, "persistent_parameters", None):
        small[0].all_gather(small)
