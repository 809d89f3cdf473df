"""What all tests share: the GPU's kernels without one, torch on one thread, and who runs beside whom."""

import os
from typing import Any

import pytest

# Read when torch is imported. Threads that wait for each other by spinning take a busy core from each other: on two
# cores beside the other half of the tests, a model on two threads took 80 s where it takes 3 of them asleep.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Ray's own 30 s for the start of its raylet are too few beside the other half of the tests on two slow cores.
os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")
import torch  # noqa: E402

if not torch.cuda.is_available():
    # Set before anything imports Triton, this has its kernels interpreted, on the CPU's tensors.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="module")
def torch_threads(request: pytest.FixtureRequest) -> None:
    """Has torch compute on one thread, unless a module's TORCH_THREADS says otherwise.

    Threads that wait for each other take longer than what they share of tensors as small as the tests'. What splits its
    work by threads is tested with several.
    """
    torch.set_num_threads(getattr(request.module, "TORCH_THREADS", 1))


def starts_ray(nodeid: str) -> bool:
    return nodeid.startswith("tests/integration/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test, then what takes longest."""
    items.sort(key=lambda item: (not item.nodeid.startswith("tests/test_first.py"), not starts_ray(item.nodeid)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each of several processes (`-n`) takes a whole module, and one of them all that starts Ray."""
    from xdist.scheduler import LoadScopeScheduling

    class ByModule(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if starts_ray(nodeid) else nodeid.partition("::")[0]

    return ByModule(config, log)
