"""The training loop: Ray Train places the workers, DeepSpeed ZeRO-2 shards optimizer states and gradients.

A stage supplies a Task; this file knows nothing of images or language.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import tempfile
import time
from typing import Any, Protocol

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer
from torch import nn

from services.common.errors import InvalidInput
from services.compute.dtypes import choose_dtype, dtype_name
from services.compute.malloc import keep_freed_memory
from services.compute.processor import cpu_has_bfloat16
from training.config import ClusterConfig, RunConfig, load


class Task(Protocol):
    """One stage of training, on one worker."""

    module: nn.Module
    """Called with a batch and the step; returns the loss and metrics to print."""

    def batch(self, step: int, rank: int, world_size: int) -> Any:
        """The worker's share of a step; the same arguments give the same batch, so a resumed run repeats nothing."""

    def export(self, folder: pathlib.Path) -> None:
        """Writes the trained weights."""


def agreed_dtype(cluster: ClusterConfig) -> torch.dtype:
    """`cluster.dtype`, where "auto" is what every worker's processor is made for. Called by all workers at once."""
    if cluster.dtype != "auto" or cluster.use_gpu:
        return choose_dtype(cluster.dtype, "cuda")
    everywhere = torch.tensor(int(cpu_has_bfloat16()))
    torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN)
    return torch.bfloat16 if everywhere else torch.float32


def deepspeed_config(run: RunConfig, dtype: torch.dtype) -> dict[str, Any]:
    optimizer = run.optimizer
    return {
        "train_micro_batch_size_per_gpu": run.samples_per_worker,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.clip_norm,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": 2, "overlap_comm": run.cluster.use_gpu},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimizer.learning_rate,
                "betas": list(optimizer.betas),
                "weight_decay": optimizer.weight_decay,
                "torch_adam": not run.cluster.use_gpu,
            },
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": run.steps,
                "warmup_num_steps": max(2, optimizer.warmup_steps),
                "warmup_min_ratio": 0.01,
                "cos_min_ratio": 0.02,
            },
        },
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
    }


def parameter_groups(module: nn.Module, run: RunConfig) -> list[dict[str, Any]]:
    """Weights decay, norms and biases do not; the selector and the vision tower have learning rates of their own.

    A group's `learns_for` is the steps after which it rests, 0 for never.
    """
    scales = {"selector": run.optimizer.selector_lr_scale, "vision_tower": run.optimizer.vision_lr_scale}
    rests = {"selector": run.optimizer.selector_steps, "encoder": run.optimizer.encoder_steps}
    for prefix in run.optimizer.frozen:
        if not any(name.startswith(prefix) for name, _ in module.named_parameters()):
            raise InvalidInput(f"no parameter's name starts with {prefix!r}", field="optimizer.frozen")
    groups: dict[tuple[int, float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if name.startswith(run.optimizer.frozen):
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            parts = name.split(".")
            scale = next((scales[part] for part in parts if part in scales), 1.0)
            learns_for = min((rests[part] for part in parts if rests.get(part)), default=0)
            groups.setdefault((learns_for, scale, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": run.optimizer.learning_rate * scale,
            "weight_decay": run.optimizer.weight_decay if decays else 0.0,
            "learns_for": learns_for,
        }
        for (learns_for, scale, decays), parameters in groups.items()
    ]


def rate_before_rest(step: int, learns_for: int, cooldown: int) -> float:
    """Share of its learning rate in this step, counted from 0, of a part that rests after `learns_for` steps."""
    if not learns_for:
        return 1.0
    left = max(0, learns_for - step)
    return min(1.0, left / max(1, cooldown))


def what_it_is_made_of(run: RunConfig) -> dict[str, Any]:
    """What a resumed run may not change, as JSON: another stage or data under an old name is another run."""
    names = ("samples_per_worker", "init_from", "seed", "optimizer", "stage")
    return json.loads(json.dumps({name: value for name, value in dataclasses.asdict(run).items() if name in names}))


def check_resumed(name: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises InvalidInput naming what differs between a checkpoint's run and the one that would go on with it."""
    different = [
        f"{field} was {before.get(field)!r}, is {value!r}" for field, value in now.items() if before.get(field) != value
    ]
    if different:
        raise InvalidInput(f"a run of other settings has the name {name!r}: {'; '.join(different)}", field="name")


def train_worker(payload: dict[str, Any]) -> None:
    """Runs in each Ray Train worker."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if payload["run"].cluster.use_gpu else "cpu")
    import deepspeed

    run: RunConfig = payload["run"]
    made_of: dict[str, Any] = payload["made_of"]
    torch.set_num_threads(run.cluster.threads_per_worker)
    if not run.cluster.use_gpu:
        keep_freed_memory()
    torch.manual_seed(run.seed)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    module_name, class_name = payload["task"]
    dtype = agreed_dtype(run.cluster)
    task: Task = getattr(importlib.import_module(module_name), class_name)(run)
    buffers = {name: buffer.clone() for name, buffer in task.module.named_buffers()}
    engine, _, _, _ = deepspeed.initialize(
        model=task.module, model_parameters=parameter_groups(task.module, run), config=deepspeed_config(run, dtype)
    )
    for name, buffer in buffers.items():
        # DeepSpeed casts buffers too: rotary frequencies in bf16 would turn far tokens by radians.
        owner, _, leaf = name.rpartition(".")
        setattr(task.module.get_submodule(owner), leaf, buffer.to(engine.device))
    if rank == 0:
        print(f"{run.name}: {world_size} worker(s), {dtype_name(dtype)}", flush=True)
    start = 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            _, state = engine.load_checkpoint(folder, tag="state")
        check_resumed(run.name, state.get("made_of", made_of), made_of)
        start = int(state["step"])
        if rank == 0:
            print(f"resumed at step {start} of {run.steps}", flush=True)
    began = time.perf_counter()
    means: dict[str, float] = {}
    for step in range(start, run.steps):
        loss, metrics = engine(task.batch(step, rank, world_size), step)
        engine.backward(loss)
        for group in engine.optimizer.param_groups:
            # At rest momentum alone would carry it on. The scheduler sets the rate anew for the next step.
            group["lr"] *= rate_before_rest(step, group["learns_for"], run.optimizer.rest_cooldown)
        engine.step()
        for name, value in {"loss": float(loss.detach()), **metrics}.items():
            means[name] = value if name not in means else 0.9 * means[name] + 0.1 * value
        done = step + 1
        if rank == 0 and (done % run.log_every == 0 or done == run.steps):
            _progress(run, done, start, began, means)
        if done % run.checkpoint_every == 0 or done == run.steps:
            with tempfile.TemporaryDirectory() as folder:
                engine.save_checkpoint(folder, tag="state", client_state={"step": done, "made_of": made_of})
                ray.train.report({"step": done, **means}, checkpoint=ray.train.Checkpoint.from_directory(folder))
    if rank == 0:
        task.export(pathlib.Path(run.output))
        print(f"exported to {run.output}", flush=True)
    torch.distributed.barrier()


def _progress(run: RunConfig, done: int, start: int, began: float, means: dict[str, float]) -> None:
    per_step = (time.perf_counter() - began) / (done - start)
    left = per_step * (run.steps - done)
    values = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
    print(f"{run.name} {done}/{run.steps}  {values}  {per_step:.2f} s/step  {left / 60:.1f} min left", flush=True)


def main(task: tuple[str, str], description: str) -> None:
    """The command line of a stage: `python training/<stage>.py --config FILE [--set name=value ...]`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="replaces one value")
    arguments = parser.parse_args()
    try:
        run = load(arguments.config, arguments.set)
    except (InvalidInput, OSError) as error:
        raise SystemExit(f"{arguments.config}: {error}") from None
    made_of = what_it_is_made_of(run)
    run = _absolute(run)
    if run.init_from and "://" not in run.init_from and not pathlib.Path(run.init_from).exists():
        raise SystemExit(f"init_from: {run.init_from} does not exist; run the stage before, or --set init_from=FOLDER")
    if not ray.is_initialized():
        # Ray Train watches its controller through the dashboard's state API: without one it ends healthy runs.
        ray.init(address=os.environ.get("RAY_ADDRESS"), include_dashboard=True)
    cluster = run.cluster
    result = TorchTrainer(
        train_worker,
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
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            # Ray Train's own copy of what workers print would show every progress line twice.
            worker_runtime_env={"env_vars": {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}},  # type: ignore[call-arg]
        ),
    ).fit()
    if result.error:
        raise SystemExit(f"{run.name} failed: {result.error}")


def _absolute(run: RunConfig) -> RunConfig:
    """Workers run in other folders: paths are made absolute here, where the user meant them."""

    def absolute(path: str) -> str:
        return path if not path or "://" in path else str(pathlib.Path(path).expanduser().resolve())

    cluster = dataclasses.replace(run.cluster, storage_path=absolute(run.cluster.storage_path))
    stage = dict(run.stage)
    if isinstance(data := stage.get("data"), str) and ("/" in data or pathlib.Path(data).suffix):
        stage["data"] = absolute(data)  # a file, not the name of a generator
    return dataclasses.replace(
        run, output=absolute(run.output), init_from=absolute(run.init_from), cluster=cluster, stage=stage
    )
