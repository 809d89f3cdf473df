"""The stages' own ports and what opens them, as a gateway learns them: a process of the cluster tells.

Which addresses Ray takes for this machine's is settled when Ray is imported, by variables that only the cluster's own
processes have.
"""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys

import ray

from cluster.local import LocalCluster
from cluster.loopback import LOOPBACK
from cluster.ray_head import cluster_environment
from services.gateway.serve_replicas import ServeReplicas

STAGES = {"encoder": "Encoder", "llm": "LanguageModel"}


def stage_ports(cluster: LocalCluster) -> dict[str, tuple[str, str]]:
    """For each stage, the address of a replica and its secret."""
    command = [sys.executable, "-m", "benchmarks.storm.stage_ports", f"{LOOPBACK}:{cluster.state.ports.gcs}"]
    env = cluster_environment(cluster.state, {})
    told = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    return {stage: (address, secret) for stage, (address, secret) in json.loads(told.splitlines()[-1]).items()}


async def _found() -> dict[str, tuple[str, str]]:
    replicas = {stage: (await ServeReplicas(name, stage).running())[0] for stage, name in STAGES.items()}
    return {stage: (replica.address, replica.secret) for stage, replica in replicas.items()}


if __name__ == "__main__":
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
    print(json.dumps(asyncio.run(_found())))
