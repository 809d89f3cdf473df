"""What must hold before a cluster can start; each failure is one line that says what to do. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import pathlib
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from services.common.errors import InvalidInput

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
DASHBOARD_PORT, METRICS_PORT, HTTP_PORT = 8265, 8080, 8000


class ClusterError(Exception):
    """One line for a person: what is wrong and what to do."""


@dataclass(frozen=True, kw_only=True)
class Ports:
    """TCP ports of one local cluster."""

    grpc: int
    dashboard: int
    metrics: int
    gcs: int
    agent: int
    agent_grpc: int
    runtime_env: int
    http: int


def check_ray() -> None:
    """Raises ClusterError when the serving extra is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ClusterError("ray is not installed: pip install '.[serve]' in the source tree")


def check_disk(folder: pathlib.Path, min_free_bytes: int) -> None:
    """Raises ClusterError when the disk under `folder` is nearly full."""
    free = shutil.disk_usage(folder).free
    if free < min_free_bytes:
        raise ClusterError(
            f"only {free / 2**20:.0f} MB free in {folder.parent}, {min_free_bytes / 2**20:.0f} MB are needed: "
            "free some space or set TMPDIR to a larger disk"
        )


def check_port(port: int, option: str) -> None:
    """Raises ClusterError when something listens on the port."""
    if not 0 < port < 65536:
        raise ClusterError(f"{option} is {port}, expected 1 to 65535")
    if not _is_free(port):
        raise ClusterError(f"port {port} is taken: stop what uses it, or choose another with {option}")


def check_host(host: str) -> str:
    """The address of this machine that a host name or address means. Raises ClusterError when it is none of its own."""
    try:
        family, _, _, _, place = min(socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM))  # IPv4 first
        with socket.socket(family) as probe:
            probe.bind((place[0], 0))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ClusterError(f"--host is {host!r}, expected an address of this machine ({reason})") from None
    return str(place[0])


def check_network(closed_by: object) -> None:
    """Raises InvalidInput until the operator has said how the network of a Ray cluster is closed."""
    if not isinstance(closed_by, str) or not closed_by.strip():
        raise InvalidInput(
            "is not set: Ray runs code for whoever reaches its ports, so say how strangers are kept from them, "
            'as network: "firewall, only 443 from outside" (docs/security.md)',
            field="network",
        )


def free_ports(grpc_port: int = 0, http_port: int = 0) -> Ports:
    """Ports that are free now: Ray's usual ones for the dashboard, the metrics and HTTP when they are."""
    with contextlib.ExitStack() as held:
        fresh = _fresh_ports(held)
        return Ports(
            grpc=grpc_port or next(fresh),
            dashboard=DASHBOARD_PORT if _is_free(DASHBOARD_PORT) else next(fresh),
            metrics=METRICS_PORT if _is_free(METRICS_PORT) else next(fresh),
            gcs=next(fresh),
            agent=next(fresh),
            agent_grpc=next(fresh),
            runtime_env=next(fresh),
            http=http_port or (HTTP_PORT if _is_free(HTTP_PORT) else next(fresh)),
        )


def _fresh_ports(held: contextlib.ExitStack) -> Iterator[int]:
    while True:  # all are held until the last is chosen, so no two are the same
        listener = held.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        yield listener.getsockname()[1]


def _is_free(port: int) -> bool:
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        with contextlib.closing(socket.socket(family)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind((address, port))
            except OSError as error:
                if family == socket.AF_INET or error.errno == errno.EADDRINUSE:  # a machine without IPv6 says otherwise
                    return False
    return True
