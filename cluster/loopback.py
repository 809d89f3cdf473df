"""Keeps the gRPC servers of Ray's workers off the network.

Ray Serve binds the gRPC port of its proxy and one of every replica to all interfaces, and has no setting for either.
What each of them listens on afterwards is read back by `cluster.listeners`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from grpc.aio import _server

PUBLIC_VARIABLE = "FOCUSLLAVA_PUBLIC_GRPC"
"""HOST:PORT of the one gRPC server that other machines may reach; unset: none."""
LOOPBACK = "127.0.0.1"


def keep_servers_local() -> None:
    """Every gRPC server that this process makes from now on listens on 127.0.0.1; the public one on its host too."""
    server: Any = _server.Server
    for name in ("add_insecure_port", "add_secure_port"):
        setattr(server, name, _kept_local(getattr(server, name)))


def addresses(asked: str, public: str) -> list[str]:
    """The addresses at which a server listens that asked for `asked`; `public` as PUBLIC_VARIABLE has it, or empty."""
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
