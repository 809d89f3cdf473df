"""What a replica of either model stage has: a place to run, its part of a GPU, and a task that reports."""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from services.common.foreign_methods import ForeignMethods
from services.common.port import StagePort
from services.common.settings import require
from services.compute.dtypes import Dtype, choose_dtype
from services.compute.malloc import keep_freed_memory

REPORT_PERIOD_S = 1.0
LONGEST_DRAIN_S = 3600.0


class StageDeployment(ForeignMethods, abc.ABC):
    """What both model stages have beside their methods: a port of their own, and nothing to say over HTTP.

    Serve calls all of this: `record_replica_metadata` once, when the replica is ready, and `__del__` when it is to go
    and the calls through Serve's ingress have ended.
    """

    port: StagePort
    host: str
    """The address of this node that Ray's other nodes know."""

    async def __call__(self, request: Request) -> Response:
        return PlainTextResponse("this stage speaks gRPC", 404)

    async def record_replica_metadata(self) -> dict[str, str]:
        """The port's address and secret, for the gateways."""
        return await self.port.start(self.host)

    @abc.abstractmethod
    def work(self) -> dict[str, float]:
        """What the replica has before it, by the names of its gauges. `cluster/autoscaling.py` scales by it."""

    def record_autoscaling_stats(self) -> dict[str, float]:
        return self.work()

    async def __del__(self) -> None:
        """Waits for the calls at the port; Serve ends the replica after `graceful_shutdown_timeout_s` at the latest."""
        await self.port.close(LONGEST_DRAIN_S)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """`args` that both model applications take."""

    checkpoint: str
    device: str = "auto"
    """"auto" takes a GPU when there is one."""
    dtype: Dtype = "auto"
    """What the model computes in. "auto" is bfloat16 on a device that multiplies in it, float32 on any other."""
    torch_threads: int | None = None
    """Threads that torch computes on; unset: OMP_NUM_THREADS, which Ray sets to the replica's num_cpus, 1 at least."""
    memory_share: float = 0.9
    """Share of a GPU's memory, or of a machine's free memory, that is used where no size is said."""

    def __post_init__(self) -> None:
        require(_is_device(self.device), "device", self.device, "auto, cpu, cuda or another device of torch")
        require(0 < self.memory_share <= 1, "memory_share", self.memory_share, "(0, 1]")
        require(self.torch_threads is None or self.torch_threads >= 1, "torch_threads", self.torch_threads, "1 or more")

    def place(self) -> tuple[str, torch.dtype]:
        """Sets up this process, its threads and on a CPU its allocator; returns the device and the weights' dtype."""
        if self.torch_threads:
            torch.set_num_threads(self.torch_threads)
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            keep_freed_memory()
        return device, choose_dtype(self.dtype, device)


def _is_device(name: str) -> bool:
    try:
        return name == "auto" or bool(torch.device(name).type)
    except RuntimeError:  # torch's words for a name that it does not know
        return False


def gpu_part(device: str, assigned: Callable[[], Mapping[str, float]]) -> float:
    """The part of a GPU that a replica was given; 1 where it runs on none. assigned: asks Ray for its resources.

    Raises InvalidInput for a GPU that it was not given: other replicas would count on the same memory.
    """
    if not device.startswith("cuda"):
        return 1.0
    given = assigned().get("GPU", 0.0)
    expected = "cpu, or a GPU that Ray gave this replica: num_gpus in its ray_actor_options"
    require(given > 0, "device", device, expected)
    return min(given, 1.0)


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
