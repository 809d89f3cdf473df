"""The processes of one local cluster: starts a Ray head, knows its own by a marker in their environment, ends them."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.checks import REPOSITORY, ClusterError, Ports

MARKER = "FOCUSLLAVA_CLUSTER"
"""Environment variable that every process of one cluster inherits; its value is the cluster's temporary folder."""


@dataclass(frozen=True, kw_only=True)
class ClusterState:
    """What `down` and `status` need; kept in a file only its owner can write."""

    temp_dir: str
    checkpoint: str
    ports: Ports

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.ports.grpc}"

    @property
    def openai_url(self) -> str:
        return f"http://127.0.0.1:{self.ports.http}/v1"

    @property
    def dashboard_url(self) -> str:
        return f"http://127.0.0.1:{self.ports.dashboard}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.ports.metrics}/metrics"

    def pids(self) -> list[int]:
        """Processes of this cluster that live."""
        sign = f"{MARKER}={self.temp_dir}\0".encode()
        found = []
        for entry in pathlib.Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    if sign in (entry / "environ").read_bytes() and "\nState:\tZ" not in (entry / "status").read_text():
                        found.append(int(entry.name))
                except OSError:  # ended meanwhile, or another user's
                    continue
        return found

    def last_words(self) -> str:
        """The last line that the Ray head printed."""
        log = pathlib.Path(self.temp_dir) / "ray-start.log"
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "no output"


def new_temp_dir() -> pathlib.Path:
    """A folder of its own for one cluster. Raises ClusterError when none can be made."""
    base = tempfile.gettempdir()
    if len(base) > 24:  # Ray puts Unix sockets below it, whose paths may have 107 characters
        base = "/tmp"
    try:
        return pathlib.Path(tempfile.mkdtemp(prefix="focusllava-", dir=base))
    except OSError as error:
        raise ClusterError(f"cannot write to {base} ({error.strerror}): free some space or set TMPDIR") from None


def start_head(state: ClusterState, extra_env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Starts a Ray head that outlives this process, and remembers it for `load_state`."""
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_JOB_ID", "RAY_AUTH_TOKEN")}
    env |= {
        MARKER: state.temp_dir,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH")))),
        "FOCUSLLAVA_CHECKPOINT": state.checkpoint,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_AUTH_MODE": "disabled",  # so that `serve status` needs no token
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # a killed proxy is back in 5 to 10 s, not 31
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(2**29),  # of Ray's 2 GB a stranger's one message would fill a laptop
        "RAY_metrics_report_interval_ms": "2000",
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",  # fresh from the disk on a busy machine Ray's 60 are too few
        "RAY_worker_niceness": "0",  # Ray's 15 starves the replicas whenever anything else runs
        **extra_env,
    }
    ports = state.ports
    options = {
        "node-ip-address": "127.0.0.1", "port": ports.gcs, "ray-client-server-port": ports.ray_client,
        "dashboard-host": "127.0.0.1", "dashboard-port": ports.dashboard, "dashboard-agent-listen-port": ports.agent,
        "metrics-export-port": ports.metrics, "num-cpus": max(4, os.cpu_count() or 1),
        "object-store-memory": 200 * 2**20, "temp-dir": state.temp_dir, "include-dashboard": "true",
    }  # fmt: skip
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--{name}={value}" for name, value in options.items()]
    with open(pathlib.Path(state.temp_dir) / "ray-start.log", "wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, cwd=REPOSITORY, start_new_session=True
        )
    _state_file(ports.grpc).write_text(json.dumps(dataclasses.asdict(state)), encoding="utf8")
    return process


def stop_head(state: ClusterState, *, keep_logs: bool = False) -> None:
    """Ends every process of the cluster: politely, then for good."""
    for sign, patience_s in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 5.0)):
        for pid in state.pids():
            try:
                os.kill(pid, sign)
            except (ProcessLookupError, PermissionError):
                continue
        end = time.monotonic() + patience_s
        while state.pids() and time.monotonic() < end:
            time.sleep(0.1)
    _state_file(state.ports.grpc).unlink(missing_ok=True)
    if not keep_logs:
        shutil.rmtree(state.temp_dir, ignore_errors=True)


def load_state(grpc_port: int) -> ClusterState | None:
    """The cluster that was left running on this port; None when there is none, or its processes are gone.

    Raises ClusterError when another version of this program wrote it down.
    """
    file = _state_file(grpc_port)
    try:
        raw = json.loads(file.read_text(encoding="utf8"))
        state = ClusterState(**{**raw, "ports": Ports(**raw["ports"])})
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    except (TypeError, KeyError):
        raise ClusterError(f"{file} is of another version: stop its cluster with that, or remove the file") from None
    return state if state.pids() else None


def _state_file(grpc_port: int) -> pathlib.Path:
    folder = pathlib.Path(tempfile.gettempdir()) / f"focusllava-state-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    info = folder.lstat()
    if info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise ClusterError(f"{folder} is not a private folder of yours: remove it")
    return folder / f"{grpc_port}.json"
