"""What a stage of training supplies to the loop (`training/trainer.py`)."""

from __future__ import annotations

import pathlib
from typing import Any, Protocol

import torch
from torch import nn


class Task(Protocol):
    """One stage of training, on one worker. A subclass leaves out what its stage has not: it then does nothing."""

    module: nn.Module
    """Called with a micro-batch, the step, and where `count` counts, the Totals of the global batch; returns the loss
    and metrics to print. With totals the loss is the micro-batch's part, as `Totals` says."""

    def batch(self, step: int, place: int, places: int) -> Any:
        """The micro-batch at a place of a step's global batch; the same arguments give the same one, so a resumed run
        repeats nothing. All places together are the same samples however many places there are."""

    def count(self, batch: Any, step: int) -> torch.Tensor | None:
        """float64 [n]: what the loss of the global batch divides by, this micro-batch's part of it; None where the
        loss is a mean of its own."""

    def identity(self) -> str:
        """A hash of the data and its order; a resumed run with another is refused."""

    def epoch(self) -> int:
        """Steps in which each entry of the data comes once; 0 where its data has no end."""

    def export(self, folder: pathlib.Path) -> None:
        """Writes the trained weights, by the first worker. Called by all workers at once."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides weights, the same on all workers. Called by all workers at once."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint's state."""
        return None

    def close(self) -> None:
        """Ends what the task has begun. Called by all workers at once."""
        return None

    def validate(self, step: int) -> dict[str, float]:
        """What is measured on held-out data, "validation_loss" among it; nothing where there is none. Called by all
        workers at once."""
        return {}
