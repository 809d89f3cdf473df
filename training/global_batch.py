"""A step's global batch: micro-batches by worker and accumulation, what its loss divides by, and where tensors live."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch.distributed import ReduceOp, all_reduce

from services.common.errors import InvalidInput
from training.config import RunConfig

T = TypeVar("T")


def accumulation(run: RunConfig, workers: int) -> int:
    """Micro-batches that each worker accumulates in a step. Raises InvalidInput for a product that does not fit."""
    at_once = run.samples_per_worker * workers
    if not run.global_batch:
        return 1
    if run.global_batch % at_once:
        fits = f"a multiple of samples_per_worker {run.samples_per_worker} x workers {workers} = {at_once}"
        wrong = f"is {run.global_batch}, expected {fits}: micro-batch x accumulation x workers is the global batch"
        raise InvalidInput(wrong, field="global_batch")
    return run.global_batch // at_once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Totals:
    """What the loss of a global batch divides by.

    A micro-batch's loss is its sums over these, times `micro_batches`: the trainer and DeepSpeed take the mean over
    micro-batches and workers, which is then the global batch's loss.
    """

    micro_batches: int
    """Micro-batches of the global batch: accumulation times workers."""
    counts: torch.Tensor
    """float64, on the CPU: the sums of what `Task.count` gives."""


def sum_counts(counts: list[torch.Tensor], micro_batches: int, device: torch.device) -> Totals:
    """Sums this worker's counts and all workers'. Called by all workers at once."""
    total = torch.stack([count.double() for count in counts]).sum(0).to(device)
    all_reduce(total)
    return Totals(micro_batches=micro_batches, counts=total.cpu())


def mean_over_workers(values: list[float], device: torch.device) -> list[float]:
    """The mean over all workers of each value, the same bits everywhere. Called by all workers at once."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    all_reduce(tensor, ReduceOp.SUM)
    return (tensor / torch.distributed.get_world_size()).tolist()


def to_device(batch: T, device: torch.device | str) -> T:
    """The same batch with every tensor on the device, however deep it lies in lists, mappings and dataclasses."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)  # type: ignore[return-value]
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}  # type: ignore[return-value]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))  # type: ignore[return-value]
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)  # type: ignore[return-value]
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        values: dict[str, Any] = {}
        for field in dataclasses.fields(batch):
            before = getattr(batch, field.name)
            if (after := to_device(before, device)) is not before:
                values[field.name] = after
        return dataclasses.replace(batch, **values)
    return batch
