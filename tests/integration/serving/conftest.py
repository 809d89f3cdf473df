"""One cluster serves every test that asks for it; its first raylet dies as it starts.

Its checkpoint is what a short training run of both samplers exports of a random import.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import threading
import time

import grpc
import pytest

from cluster.local import LocalCluster
from services.checkpoint.store import fingerprint
from services.common.stage_secret import SECRET_VARIABLE
from tests.serving_client import FP32, OPTIONS, SECRET, pid_of
from tests.tiny_training import train_imported


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory) -> tuple[pathlib.Path, str]:
    folder = train_imported(tmp_path_factory.mktemp("serving"))
    return folder, fingerprint(folder)


ALONE = {stage: {"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}} for stage in ("encoder", "llm")}
"""No second replica takes a slow machine's cores while others are tested; test_under_load.py asks for one."""


@pytest.fixture(scope="package")
def cluster(checkpoint):
    said: list[str] = []
    killed: list[int] = []
    env = {SECRET_VARIABLE: SECRET}
    with LocalCluster(checkpoint=checkpoint[0], grpc_port=0, timeout_s=400, args=FP32, options=ALONE, env=env) as local:
        killer = threading.Thread(target=kill_first_raylet, args=(local, killed), daemon=True)
        killer.start()
        local.start(progress=said.append)
        killer.join(60)
        # Ray's own parent process may say it first: "Ray died", not "raylet died".
        assert killed and any("died" in line and "trying once more" in line for line in said), said
        assert killed[0] not in local.state.pids() and any("gateway running" in line for line in said)
        yield local


def kill_first_raylet(local: LocalCluster, killed: list[int]) -> None:
    """Sends SIGKILL as soon as it runs, which is before the dashboard answers."""
    while not killed:
        with contextlib.suppress(AssertionError):  # there is no state yet
            raylet = pid_of(local.state, "raylet")
            if raylet is not None:
                os.kill(raylet, signal.SIGKILL)
                killed.append(raylet)
        time.sleep(0.1)


@pytest.fixture(scope="package")
def channel(cluster):
    with grpc.insecure_channel(cluster.grpc_address, options=OPTIONS) as channel:
        yield channel
