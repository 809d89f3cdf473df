"""The Ray that a command trains on: the one that RAY_ADDRESS names, or one of its own."""

from __future__ import annotations

import os
import socket

import ray
from ray.util import get_node_ip_address

ADDRESS, OWN = "RAY_ADDRESS", "local"


def start_ray() -> None:
    """Joins the Ray that RAY_ADDRESS names; without it starts one that ends with this process, whatever else runs here.

    Ray Train asks in processes of its own whether its actors live. They are told which Ray that is: with two on the
    machine they would not choose, and end a healthy run.
    """
    address = os.environ.get(ADDRESS) or OWN
    if address == OWN:
        os.environ["RAY_GCS_SERVER_PORT"] = str(port := _free_port())
        known = f"{get_node_ip_address()}:{port}"
        print(f"starting a Ray of its own on this machine; {ADDRESS}=auto joins one that runs here", flush=True)
    elif address == "auto":
        ray.init(address=address)
        known = address = ray.get_runtime_context().gcs_address
        ray.shutdown()
    else:
        known = address
    # Without its dashboard Ray Train finds none of its actors.
    ray.init(address=address, include_dashboard=True, runtime_env={"env_vars": {ADDRESS: known}})


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("", 0))
        port: int = listening.getsockname()[1]
        return port
