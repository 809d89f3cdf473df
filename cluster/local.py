"""A Ray of our own on this machine with the three applications: `python -m cluster.local up | down | status`.

It takes free ports and a temporary folder of its own, so another Ray on the machine is not disturbed, and only what was
started here is stopped. The dashboard listens on the loopback interface alone; Ray binds Serve's gRPC ingress, the
metrics endpoint and its internal ports to every interface, so use it where the network is trusted.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import pathlib
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from cluster.checks import (
    ClusterError,
    Ports,
    check_disk,
    check_port,
    check_ray,
    find_checkpoint,
    free_ports,
)
from cluster.interrupts import signals_interrupt
from cluster.ray_head import ClusterState, load_state, new_temp_dir, start_head, stop_head
from services.common.errors import FocusError

SERVE_CONFIG = pathlib.Path(__file__).with_name("serve.yaml")
DEFAULT_GRPC_PORT = 9000
MIN_FREE_BYTES = 2**30
LARGE_BYTES = 2**30
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")

Progress = Callable[[str], None]


class LocalCluster:
    """Starts and stops a local cluster; as a context manager it is stopped at the end of the block.

    grpc_port 0 takes a free one, http_port 0 the usual 8000 or else a free one. args and options: per application,
    settings and its deployment's options, laid over those of the Serve configuration (`cluster/placing.py` makes them).
    """

    def __init__(
        self,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        grpc_port: int = DEFAULT_GRPC_PORT,
        http_port: int = 0,
        config: str | os.PathLike[str] = SERVE_CONFIG,
        args: Mapping[str, Mapping[str, Any]] | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 300.0,
    ):
        self._checkpoint, self._config = checkpoint, pathlib.Path(config)
        self._grpc_port, self._http_port = grpc_port, http_port
        self._args, self._env, self._timeout_s = args or {}, env or {}, timeout_s
        self._options = options or {}
        self._head: subprocess.Popen[bytes] | None = None
        self._state: ClusterState | None = None

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def state(self) -> ClusterState:
        assert self._state, "the cluster is not started"
        return self._state

    @property
    def grpc_address(self) -> str:
        """host:port of the public API."""
        return self.state.grpc_address

    @property
    def openai_url(self) -> str:
        """Base URL of the public API for OpenAI's clients."""
        return self.state.openai_url

    @property
    def dashboard_url(self) -> str:
        return self.state.dashboard_url

    @property
    def metrics_url(self) -> str:
        """Ray's Prometheus endpoint."""
        return self.state.metrics_url

    def start(self, progress: Progress = print) -> LocalCluster:
        """Returns once the three applications run and the public API answers.

        Raises:
            InvalidInput: there is no checkpoint.
            ClusterError: what is missing (disk, port, ray), or which application failed and why.
        """
        began = time.monotonic()
        checkpoint = find_checkpoint(self._checkpoint)
        check_ray()
        for port, option in ((self._grpc_port, "--grpc-port"), (self._http_port, "--http-port")):
            if port:
                check_port(port, option)
        temp_dir = new_temp_dir()
        ports = free_ports(self._grpc_port, self._http_port)
        self._state = ClusterState(temp_dir=str(temp_dir), checkpoint=str(checkpoint), ports=ports)
        try:
            check_disk(temp_dir, MIN_FREE_BYTES)
            progress(f"starting Ray (logs: {temp_dir})")
            self._head = start_head(self._state, self._env)
            deadline = began + self._timeout_s
            self._wait_for_dashboard(deadline)
            progress(f"deploying gateway, encoder and llm on {checkpoint.name}")
            self._deploy(deadline)
            self._wait_for_applications(deadline, progress)
        except BaseException as error:
            self.stop(keep_logs=isinstance(error, ClusterError) and self._head is not None)
            raise
        progress(f"serving at {self.grpc_address} after {time.monotonic() - began:.0f} s")
        return self

    def stop(self, *, keep_logs: bool = False) -> None:
        """Ends every process that `start` brought up, and removes its temporary folder."""
        if self._state:
            stop_head(self._state, keep_logs=keep_logs)
            self._state = None
        if self._head:
            self._head.wait()
            self._head = None

    def _wait_for_dashboard(self, deadline: float) -> None:
        assert self._head
        while True:
            try:
                request_json(self.dashboard_url + "/api/version")
                return
            except OSError:
                pass
            if self._head.poll() is not None:
                raise ClusterError(f"Ray did not start: {self.state.last_words()}; logs: {self.state.temp_dir}")
            if time.monotonic() > deadline:
                raise ClusterError(f"Ray did not start within {self._timeout_s:.0f} s; logs: {self.state.temp_dir}")
            time.sleep(0.3)

    def _deploy(self, deadline: float) -> None:
        config = serve_config(self._config, self.state.ports, self.state.checkpoint, self._args, self._options)
        while True:
            try:
                request_json(self.dashboard_url + "/api/serve/applications/", config, timeout_s=self._timeout_s)
                return
            except urllib.error.HTTPError as error:
                lines = error.read().decode(errors="replace").strip().splitlines()
                reason = f"Ray Serve refused {self._config.name}: {lines[-1] if lines else error}"
                if error.code < 500 or time.monotonic() > deadline:
                    raise ClusterError(reason) from None
            except OSError as error:
                if time.monotonic() > deadline:
                    reason = f"Ray's dashboard did not take the deployment ({error})"
                    raise ClusterError(f"{reason}; logs: {self.state.temp_dir}") from None
            time.sleep(2)  # on a busy machine Ray gives up waiting for its own parts; the same request again is safe

    def _wait_for_applications(self, deadline: float, progress: Progress) -> None:
        said = ""
        while True:
            applications = application_states(self.state)
            line = ", ".join(f"{name} {status.lower()}" for name, (status, _) in sorted(applications.items()))
            if line and line != said:
                progress(line)
                said = line
            for name, (status, message) in applications.items():
                if status in _FAILED:
                    raise ClusterError(f"the {name} application failed: {message[:400]}; logs: {self.state.temp_dir}")
            if applications and all(status == "RUNNING" for status, _ in applications.values()):
                if _answers(self.grpc_address):
                    return
            if time.monotonic() > deadline:
                raise ClusterError(f"not serving after {self._timeout_s:.0f} s ({said}); logs: {self.state.temp_dir}")
            time.sleep(0.5)


def serve_config(
    path: pathlib.Path,
    ports: Ports,
    checkpoint: str,
    args: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The Serve configuration file with this cluster's ports, checkpoint, settings and options."""
    config = copy.deepcopy(yaml.safe_load(path.read_text(encoding="utf8")))
    config["grpc_options"]["port"] = ports.grpc
    config["http_options"] = {**config["http_options"], "host": "127.0.0.1", "port": ports.http}
    for application in config["applications"]:
        settings = application["args"] = application.get("args") or {}
        settings["checkpoint"] = checkpoint
        if application["name"] == "gateway":
            for stage in ("encoder", "llm"):
                settings[stage] = {**settings.get(stage, {}), "target": f"127.0.0.1:{ports.grpc}"}
        settings.update(args.get(application["name"], {}))
        for deployment in application.get("deployments", ()):
            deployment.update((options or {}).get(application["name"], {}))
    return config


def application_states(state: ClusterState) -> dict[str, tuple[str, str]]:
    """Status and reason of each Serve application; empty while Serve starts."""
    try:
        details = request_json(state.dashboard_url + "/api/serve/applications/")
    except OSError:
        return {}
    return {name: (a["status"], failure_line(a)) for name, a in details.get("applications", {}).items()}


def failure_line(application: Mapping[str, Any]) -> str:
    """The line nearest to the cause: a replica's last exception, else the application's own message."""
    messages = [d.get("message", "") for d in application.get("deployments", {}).values()]
    lines = [line.strip() for text in (application.get("message", ""), *messages) for line in text.splitlines()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Input|Exception|Large)\b", line)]
    return (errors or [line for line in lines if line] or [""])[-1]


def request_json(url: str, body: Mapping[str, Any] | None = None, *, timeout_s: float = 10.0) -> Any:
    """GET, or PUT with a body, on the local dashboard. Raises OSError."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method="PUT" if data else "GET")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy of the environment is not for us
    with opener.open(request, timeout=timeout_s) as response:
        text = response.read()
    return json.loads(text) if text else None


def _answers(address: str) -> bool:
    import grpc

    from focusllava.v1 import focus_pb2, focus_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        stub = focus_pb2_grpc.FocusServiceStub(channel)
        try:
            stub.GetModelInfo(focus_pb2.GetModelInfoRequest(), timeout=5, metadata=(("application", "gateway"),))
        except grpc.RpcError:
            return False
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.local", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verb", choices=("up", "down", "status"))
    parser.add_argument("--checkpoint", help="folder; default: FOCUSLLAVA_CHECKPOINT, then the shipped one")
    parser.add_argument("--grpc-port", type=int, default=DEFAULT_GRPC_PORT)
    parser.add_argument("--http-port", type=int, default=0, help="of `up`; default: 8000, or a free one if it is taken")
    options = parser.parse_args(argv)
    try:
        with signals_interrupt():
            return {"up": _up, "down": _down, "status": _status}[options.verb](options)
    except (ClusterError, FocusError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; what was started is stopped", file=sys.stderr)
        return 130


def placed(checkpoint: str | None, progress: Progress) -> dict[str, Any]:
    """Arguments of LocalCluster for a checkpoint that is large enough to be worth the seconds: a small one's replicas
    find their sizes themselves, on the CPU. Raises InvalidInput for what could never answer here."""
    folder = find_checkpoint(checkpoint)
    if sum(path.stat().st_size for path in folder.glob("*.safetensors")) < LARGE_BYTES:
        return {}
    from cluster.placing import Wishes, place

    found = place(folder, SERVE_CONFIG, Wishes())
    for line in found.lines:
        progress(line)
    return found.cluster_arguments


def _up(options: argparse.Namespace) -> int:
    ports = {"grpc_port": options.grpc_port, "http_port": options.http_port}
    state = LocalCluster(checkpoint=options.checkpoint, **ports, **placed(options.checkpoint, _say)).start(_say).state
    port = "" if state.ports.grpc == DEFAULT_GRPC_PORT else f" --grpc-port {state.ports.grpc}"
    _say(f"OpenAI's API at {state.openai_url}")
    _say(f"dashboard {state.dashboard_url}, metrics {state.metrics_url}")
    _say(f"stop it with: python -m cluster.local down{port}")
    return 0


def _down(options: argparse.Namespace) -> int:
    stop_head(_found(options.grpc_port))
    _say("stopped")
    return 0


def _status(options: argparse.Namespace) -> int:
    state = _found(options.grpc_port)
    applications = application_states(state)
    for name, (status, message) in sorted(applications.items()):
        _say(f"{name}: {status}{' ' + message if message else ''}")
    _say(f"public API {state.grpc_address}, OpenAI's at {state.openai_url}")
    _say(f"dashboard {state.dashboard_url}, metrics {state.metrics_url}")
    return 0 if applications and all(status == "RUNNING" for status, _ in applications.values()) else 1


def _found(grpc_port: int) -> ClusterState:
    state = load_state(grpc_port)
    if state is None:
        raise ClusterError(f"no cluster of ours serves on port {grpc_port}; `up` starts one")
    return state


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
