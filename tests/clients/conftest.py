"""One pipeline on the shipped checkpoint serves every client; `make clients` has made their environments."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from cluster.checks import REPOSITORY
from cluster.local import LocalCluster
from services.checkpoint.finding import find_checkpoint

ENVIRONMENTS = REPOSITORY / os.environ.get("CLIENTS", ".clients")
QUIET = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "NO_PROXY": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
}
"""What keeps the clients from calling home."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """The address at which the pipeline answers."""

    url: str
    """The server's URL without /v1."""
    grpc: str
    """The address of the gRPC API."""
    checkpoint: pathlib.Path

    @property
    def model(self) -> str:
        return self.checkpoint.name


@pytest.fixture(scope="session")
def server():
    checkpoint = find_checkpoint(None)
    if url := os.environ.get("SERVER"):  # one that runs already, such as http://127.0.0.1:8000
        yield Server(url=url, grpc=os.environ.get("SERVER_GRPC", "127.0.0.1:9000"), checkpoint=checkpoint)
        return
    with LocalCluster(checkpoint=checkpoint, grpc_port=0, timeout_s=400) as cluster:
        cluster.start()
        url = cluster.openai_url.removesuffix("/v1")
        yield Server(url=url, grpc=cluster.grpc_address, checkpoint=checkpoint)


@pytest.fixture
def run(capfd) -> Callable[..., str]:
    """Runs a command to its end, shows what it printed, and returns that."""

    def run(*command: object, seconds: int = 300, given: str | None = None) -> str:
        """given: what it reads from standard input."""
        done = subprocess.run(
            [str(word) for word in command], env={**os.environ, **QUIET}, timeout=seconds, text=True, input=given,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        with capfd.disabled():
            print(f"\n$ {' '.join(map(str, command))}\n{done.stdout}", flush=True)
        assert done.returncode == 0, done.stdout[-2000:]
        return done.stdout

    return run


def cases(printed: str) -> dict[str, Any]:
    """What each case of a script said; of one that failed, why."""
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"case":')]
    return {line["case"]: line.get("said", line.get("failed")) for line in lines}
