"""One cluster on a random checkpoint serves every test that asks for it."""

from __future__ import annotations

import pathlib

import grpc
import pytest

from cluster.local import LocalCluster
from tests.serving_client import OPTIONS
from tests.tiny_checkpoints import make_random_checkpoint


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory) -> tuple[pathlib.Path, str]:
    folder = tmp_path_factory.mktemp("serving") / "random-tiny"
    return folder, make_random_checkpoint(folder)


@pytest.fixture(scope="package")
def cluster(checkpoint):
    said: list[str] = []
    with LocalCluster(
        checkpoint=checkpoint[0],
        grpc_port=0,
        timeout_s=400,
        args={stage: {"dtype": "float32"} for stage in ("encoder", "llm")},  # compared with fp32
    ) as local:
        local.start(progress=said.append)
        assert any("gateway running" in line for line in said)
        yield local


@pytest.fixture(scope="package")
def channel(cluster):
    with grpc.insecure_channel(cluster.grpc_address, options=OPTIONS) as channel:
        yield channel
