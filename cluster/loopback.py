"""What Ray has no setting for, done in its own hooks: a local cluster's servers stay off the network.

Ray Serve binds the gRPC port of its proxy and one of every replica to all interfaces; `ray start` starts a server for
Ray's client whatever its port. What listens afterwards is read back by `cluster.listeners`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from grpc.aio import _server

HOOK_VARIABLE = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
"""Ray calls the function that this environment variable names before a worker does anything; its failure ends it."""
HOOK = "cluster.loopback.keep_servers_local"
START_HOOK_VARIABLE = "RAY_START_HOOK"
"""`ray start` calls the function that this environment variable names before it starts anything."""
START_HOOK = "cluster.loopback.without_client_server"
PUBLIC_VARIABLE = "FOCUSLLAVA_PUBLIC_GRPC"
"""HOST:PORT of the one gRPC server that other machines may reach; unset: none."""
LOOPBACK = "127.0.0.1"


def without_client_server(parameters: Any, head: bool) -> None:
    """Ray's client server runs what it is sent: it is not started."""
    parameters.ray_client_server_port = None


def keep_servers_local() -> None:
    """Every gRPC server that this process makes from now on listens on 127.0.0.1; the public one on its host too."""
    server: Any = _server.Server
    for name in ("add_insecure_port", "add_secure_port"):
        setattr(server, name, _kept_local(getattr(server, name)))


def addresses(asked: str, public: str) -> list[str]:
    """Where a server listens that asked for `asked`; `public` as PUBLIC_VARIABLE has it, or empty."""
    port = asked.rpartition(":")[2]
    host, _, public_port = public.rpartition(":")
    if not public or port != public_port:
        return [f"{LOOPBACK}:{port}"]
    if host in ("0.0.0.0", "[::]"):
        return [public]
    return [f"{LOOPBACK}:{port}", public]  # the gateway calls the stages at the first


def _kept_local(add_port: Callable[..., int]) -> Callable[..., int]:
    def add_local_port(self: Any, address: str, *credentials: Any) -> int:
        public = os.environ.get(PUBLIC_VARIABLE, "")
        return [add_port(self, each, *credentials) for each in addresses(address, public)][0]

    return add_local_port
