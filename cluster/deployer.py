"""Starts the process that deploys a local cluster's applications, and says how far it is."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from cluster.checks import REPOSITORY, ClusterError
from cluster.loopback import LOOPBACK
from cluster.ray_head import ClusterState


class Deployer:
    """Runs `cluster.deploy`; a context manager, at whose end its process ends and the applications stay."""

    def __init__(self, state: ClusterState, config: Mapping[str, Any], env: Mapping[str, str]):
        self._log = pathlib.Path(state.temp_dir) / "deploy.log"
        self._last: dict[str, Any] = {}
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cluster.deploy"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=dict(env),
                cwd=REPOSITORY,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        request = {"address": f"{LOOPBACK}:{state.ports.gcs}", "config": config}
        self._process.stdin.write(json.dumps(request).encode())
        self._process.stdin.close()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Deployer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def states(self) -> dict[str, tuple[str, str]]:
        """Status and reason of each application; empty until they are deployed.

        Raises ClusterError when they cannot be: with the field and its value, where one is wrong.
        """
        if self._process.poll() is not None:
            self._reader.join()
            lines = self._log.read_text(errors="replace").strip().splitlines()
            reason = self._last.get("error") or (lines[-1] if lines else f"exit code {self._process.returncode}")
            raise ClusterError(f"not deployed: {reason}")
        return {name: (status, reason) for name, (status, reason) in self._last.get("states", {}).items()}

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._last = json.loads(line)
