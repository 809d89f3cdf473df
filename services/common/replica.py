"""What a replica of either model stage has: a place to run, and a task that reports."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from services.common.settings import require

REPORT_PERIOD_S = 1.0


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """`args` that both model applications take."""

    checkpoint: str
    device: str = "auto"
    """"auto" takes a GPU when there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Unset: bfloat16 on a GPU, float32 on a CPU."""
    torch_threads: int | None = None
    """Unset: torch's own choice, one a core."""

    def __post_init__(self) -> None:
        require(self.torch_threads is None or self.torch_threads >= 1, "torch_threads", self.torch_threads, "1 or more")

    def place(self) -> tuple[str, torch.dtype]:
        """Sets this process's threads; returns the device and the dtype of the weights."""
        if self.torch_threads:
            torch.set_num_threads(self.torch_threads)
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return device, getattr(torch, self.dtype or ("float32" if device == "cpu" else "bfloat16"))


class Reporter:
    """Calls `report` each second for as long as the replica lives; made inside its running loop."""

    def __init__(self, report: Callable[[], None]):
        self._task = asyncio.get_running_loop().create_task(self._run(report))

    async def _run(self, report: Callable[[], None]) -> None:
        while True:
            report()
            await asyncio.sleep(REPORT_PERIOD_S)

    def check(self) -> None:
        """Raises RuntimeError when a report failed."""
        if self._task.done():
            raise RuntimeError("the metrics task ended") from self._task.exception()
