"""One Ray for all runs of a study, so that none waits for its own to start."""

from __future__ import annotations

import os
import pathlib
import secrets
import subprocess
import sys
from functools import cached_property

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Ray lives in a process of its own, which ends with this one, however that ends: its standard input is then closed.
PROGRAM = """
import sys, ray
context = ray.init(address="local", num_cpus=int(sys.argv[1]), include_dashboard=True, object_store_memory=200 * 2**20)
print("ray at", context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


class SharedRay:
    """A context manager; Ray starts when `environment` is first asked for, and ends with the block."""

    def __init__(self, cores: int):
        self.cores = cores
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> SharedRay:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.communicate()

    @cached_property
    def environment(self) -> dict[str, str]:
        """Variables with which a program finds it. Raises RuntimeError when Ray does not start."""
        variables = {
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",  # whoever reaches Ray runs code, so it asks for this and stays on 127.0.0.1
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }
        inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(self.cores)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env={**inherited, **variables, "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ray at "):
                return {**variables, "RAY_ADDRESS": line.split()[-1]}
        raise RuntimeError("Ray did not start: try `ray start --head` to see why")
