"""Functions that Ray calls in a local cluster's processes, for what it has no option for.

The environment of `ray start` names them (`cluster/ray_head.py`): one is called before it starts anything, the other
first in each worker, which ends if it fails.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from cluster.loopback import keep_servers_local


def without_client_server(parameters: Any, head: bool) -> None:
    """Keeps Ray's client server from starting, whatever its port: it would run any code that it is sent."""
    parameters.ray_client_server_port = None


def set_up_worker() -> None:
    """Keeps the worker's servers off the network, and spares it an import that it does not need."""
    keep_servers_local()
    with without_pandas():
        import ray.serve  # noqa: F401


@contextlib.contextmanager
def without_pandas() -> Iterator[None]:
    """Ray Serve imports pandas where it is installed, to show data frames in its logs: a second for each process."""
    if "pandas" in sys.modules:
        yield
        return
    sys.modules["pandas"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["pandas"]
