"""The processes of one local cluster: starts a Ray head, knows its own by a marker in their environment, ends them."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import pathlib
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.checks import REPOSITORY, ClusterError, Ports
from cluster.loopback import LOOPBACK, PUBLIC_VARIABLE
from services.common.shelf import FOLDER_VARIABLE

MARKER = "FOCUSLLAVA_CLUSTER"
"""Environment variable that every process of one cluster inherits; its value is the cluster's temporary folder."""
_FATAL = re.compile(r"^\[[^]]* [CF] \d+|Check failed|Timed out waiting for file|Out of memory")
_BEFORE_CAUSE = re.compile(r"^\[[^]]*\] *(\(\w+\) *)?(.*Check failed: (\S+\(\) )?)?")
_NOT_INHERITED = ("RAY_ADDRESS", "RAY_JOB_ID", "RAY_AUTH_TOKEN", "RAY_SERVE_ENABLE_HA_PROXY", PUBLIC_VARIABLE)


@dataclass(frozen=True, kw_only=True)
class ClusterState:
    """What `down` and `status` need; kept in a file only its owner can write."""

    temp_dir: str
    checkpoint: str
    ports: Ports
    host: str = LOOPBACK
    """The address at which the public API listens: the loopback interface's, or what `--host` opened."""
    playground: bool = True
    """Whether the HTTP port has the page."""

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.ports.grpc}"

    @property
    def openai_url(self) -> str:
        """The base URL of OpenAI's API, as seen from this machine."""
        host = LOOPBACK if self.host in ("0.0.0.0", "::") else f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.ports.http}/v1"

    @property
    def dashboard_url(self) -> str:
        return f"http://127.0.0.1:{self.ports.dashboard}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.ports.metrics}/metrics"

    @property
    def shelf(self) -> pathlib.Path:
        """Where its stages leave visual tokens for each other."""
        return pathlib.Path("/dev/shm") / f"{pathlib.Path(self.temp_dir).name}-shelf"

    @property
    def is_open(self) -> bool:
        """Whether other machines reach the public API."""
        return not ipaddress.ip_address(self.host).is_loopback

    @property
    def token_file(self) -> pathlib.Path:
        """The file with the token that Ray asks every caller for; only its owner can read it."""
        return pathlib.Path(self.temp_dir) / "auth_token"

    @property
    def ray_dir(self) -> pathlib.Path:
        """Ray's own folder. Ray lets everybody write to it, so it lies in one that only its owner can enter."""
        return pathlib.Path(self.temp_dir) / "ray"

    def pids(self) -> list[int]:
        """Processes of this cluster that live: those with its marker, and what they started."""
        sign = f"{MARKER}={self.temp_dir}\0".encode()
        children: dict[int, list[int]] = {}
        marked = []
        for entry in pathlib.Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                    if state != "Z":
                        children.setdefault(int(parent), []).append(int(entry.name))
                        if sign in (entry / "environ").read_bytes():
                            marked.append(int(entry.name))
                except OSError:  # ended meanwhile, or another user's
                    continue
        found: dict[int, None] = {}
        while marked:  # some processes of Ray's write their title over their environment
            pid = marked.pop()
            if pid not in found:
                found[pid] = None
                marked += children.get(pid, ())
        return list(found)

    def last_words(self) -> str:
        """The line of the logs that says best why the head ended."""
        logs = self.ray_dir / "session_latest" / "logs"
        for name in ("raylet.err", "raylet.out", "gcs_server.err", "gcs_server.out"):
            fatal = [line for line in _lines(logs / name) if _FATAL.search(line)]
            if fatal:
                return f"{name}: {_BEFORE_CAUSE.sub('', fatal[-1])[:400]}"
        lines = _lines(pathlib.Path(self.temp_dir) / "ray-start.log")
        return lines[-1] if lines else "no output"


def _lines(log: pathlib.Path) -> list[str]:
    try:
        return [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return []


def new_temp_dir() -> pathlib.Path:
    """A folder of its own for one cluster, which nobody else can enter. Raises ClusterError when none can be made."""
    base = tempfile.gettempdir()
    if len(base) > 18:  # Ray puts Unix sockets below it, whose paths may have 107 characters
        base = "/tmp"
    try:
        return pathlib.Path(tempfile.mkdtemp(prefix="focusllava-", dir=base))
    except OSError as error:
        raise ClusterError(f"cannot write to {base} ({error.strerror}): free some space or set TMPDIR") from None


def cluster_environment(state: ClusterState, extra_env: Mapping[str, str]) -> dict[str, str]:
    """What every process of the cluster has in its environment."""
    env = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    env |= {
        MARKER: state.temp_dir,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH")))),
        "FOCUSLLAVA_CHECKPOINT": state.checkpoint,
        FOLDER_VARIABLE: str(state.shelf),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_AUTH_MODE": "token",  # whoever reaches a port of Ray's runs code otherwise
        "RAY_AUTH_TOKEN_PATH": str(state.token_file),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # or Ray takes the machine's own address for 127.0.0.1
        "RAY_START_HOOK": "cluster.hooks.without_client_server",
        "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": "cluster.hooks.set_up_worker",
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # a killed proxy is back in 5 to 10 s, not 31
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(2**29),  # one message of Ray's 2 GB would fill a laptop
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",  # from proxy to gateway; Ray's object store costs twice as much a message
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # each message would change threads in the gateway
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # or whoever asks Ray for no GPU sees all of them
        "RAY_metrics_report_interval_ms": "2000",
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",  # fresh from the disk on a busy machine Ray's 60 are too few
        "RAY_raylet_start_wait_time_s": "300",  # Ray's 30 are too few as well: whoever waits watches the raylet itself
        "RAY_worker_niceness": "0",  # Ray's 15 starves the replicas whenever anything else runs
        **extra_env,
    }
    if state.host != LOOPBACK:
        host = f"[{state.host}]" if ":" in state.host else state.host
        env[PUBLIC_VARIABLE] = f"{host}:{state.ports.grpc}"
    return env


def start_head(state: ClusterState, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Starts a Ray head that outlives this process, in `cluster_environment`, and remembers it for `load_state`."""
    state.token_file.touch(mode=0o600)
    state.token_file.write_text(secrets.token_hex(32), encoding="ascii")
    ports = state.ports
    options = {
        "node-ip-address": LOOPBACK, "port": ports.gcs, "dashboard-host": LOOPBACK, "dashboard-port": ports.dashboard,
        "dashboard-agent-listen-port": ports.agent,
        # Without ports for its agents the raylet waits for theirs, and dies when they need more than 15 s.
        "dashboard-agent-grpc-port": ports.agent_grpc, "runtime-env-agent-port": ports.runtime_env,
        "metrics-export-port": ports.metrics, "num-cpus": max(4, os.cpu_count() or 1),
        "object-store-memory": 200 * 2**20, "temp-dir": state.ray_dir, "include-dashboard": "true",
        "include-log-monitor": "false",
    }  # fmt: skip
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--no-monitor", *(f"--{name}={value}" for name, value in options.items())]
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
    shutil.rmtree(state.shelf, ignore_errors=True)
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
