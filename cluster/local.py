"""A Ray of our own on this machine with the three applications: `python -m cluster.local up | down | status`.

It takes free ports and a temporary folder of its own, so another Ray on the machine is not disturbed, and only what was
started here is stopped. It listens on the loopback interface alone, but for the public API where `host` says otherwise,
and Ray asks every caller for a token (docs/security.md).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from cluster.checks import (
    ClusterError,
    Ports,
    check_disk,
    check_host,
    check_port,
    check_ray,
    free_ports,
)
from cluster.deployer import Deployer
from cluster.interrupts import signals_interrupt
from cluster.loopback import LOOPBACK
from cluster.ray_head import ClusterState, cluster_environment, load_state, new_temp_dir, start_head, stop_head
from cluster.serve_api import answers, application_states, request_json
from cluster.watch import HeadDied, StartWatch, check_listeners
from services.checkpoint.finding import find_checkpoint
from services.common.errors import FocusError

SERVE_CONFIG = pathlib.Path(__file__).with_name("serve.yaml")
DEFAULT_GRPC_PORT = 9000
MIN_FREE_BYTES = 2**30
"""Room on the disk of the temporary folder."""
LARGE_BYTES = 2**30
"""Weights of a checkpoint whose place and sizes are worked out before the start."""
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")
_DEPLOYMENTS = {"encoder": "Encoder", "llm": "LanguageModel"}

Progress = Callable[[str], None]


class LocalCluster:
    """Starts and stops a local cluster; as a context manager it is stopped at the end of the block.

    host: where the public API listens; the rest never leaves the loopback interface. grpc_port 0 takes a free one,
    http_port 0 the usual 8000 or else a free one. api_keys: a file of keys, which the gateway then asks for. args and
    options: per application, settings and its deployment's options, laid over those of the Serve configuration
    (`cluster/placing.py` makes them). timeout_s: longest that a start may take without any progress.
    """

    def __init__(
        self,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        host: str = LOOPBACK,
        grpc_port: int = DEFAULT_GRPC_PORT,
        http_port: int = 0,
        config: str | os.PathLike[str] = SERVE_CONFIG,
        api_keys: str | os.PathLike[str] | None = None,
        args: Mapping[str, Mapping[str, Any]] | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 300.0,
    ):
        self._checkpoint, self._config = checkpoint, pathlib.Path(config)
        self._host, self._grpc_port, self._http_port = host, grpc_port, http_port
        self._args, self._env, self._timeout_s = dict(args or {}), env or {}, timeout_s
        if api_keys is not None:
            keys = {"api_keys": str(pathlib.Path(api_keys).absolute())}
            self._args["gateway"] = {**keys, **self._args.get("gateway", {})}
        self._options = options or {}
        self._head: subprocess.Popen[bytes] | None = None
        self._state: ClusterState | None = None
        self._watch: StartWatch | None = None

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
        host = check_host(self._host)
        for port, option in ((self._grpc_port, "--grpc-port"), (self._http_port, "--http-port")):
            if port:
                check_port(port, option)
        try:
            self._start(checkpoint, host, progress)
        except HeadDied as death:  # its processes wait for each other's, with limits that a busy machine oversteps
            progress(f"{death}; trying once more")
            self._start(checkpoint, host, progress)
        progress(f"serving at {self.grpc_address} after {time.monotonic() - began:.0f} s")
        return self

    def _start(self, checkpoint: pathlib.Path, host: str, progress: Progress) -> None:
        temp_dir = new_temp_dir()
        ports = free_ports(self._grpc_port, self._http_port)
        self._state = ClusterState(temp_dir=str(temp_dir), checkpoint=str(checkpoint), ports=ports, host=host)
        try:
            check_disk(temp_dir, MIN_FREE_BYTES)
            config = serve_config(self._config, ports, str(checkpoint), self._args, self._options, host=host)
            gateway = next(each for each in config["applications"] if each["name"] == "gateway")
            self._state = dataclasses.replace(self._state, playground=gateway["args"].get("playground", True))
            progress(f"starting Ray (logs: {temp_dir})")
            env = cluster_environment(self._state, self._env)
            self._head = start_head(self._state, env)
            self._watch = StartWatch(self._state, self._head, self._timeout_s)
            with Deployer(self._state, config, env) as deployer:
                self._wait_for_applications(deployer, progress)
            self._wait_for_dashboard()
            check_listeners(self._state)
        except BaseException as error:
            self.stop(keep_logs=isinstance(error, ClusterError) and self._head is not None)
            raise

    def stop(self, *, keep_logs: bool = False) -> None:
        """Ends every process that `start` brought up, and removes its temporary folder."""
        if self._state:
            stop_head(self._state, keep_logs=keep_logs)
            self._state = None
        if self._head:
            self._head.wait()
            self._head = None

    def _wait_for_dashboard(self) -> None:
        assert self._watch
        while True:
            try:
                request_json(self.state, "/api/version")
                return
            except OSError:
                pass
            self._watch.check()
            time.sleep(0.3)

    def _wait_for_applications(self, deployer: Deployer, progress: Progress) -> None:
        assert self._watch
        said = ""
        while True:
            applications = deployer.states()
            line = ", ".join(f"{name} {status.lower()}" for name, (status, _) in sorted(applications.items()))
            if line and line != said:
                progress(line)
                said = line
            for name, (status, message) in applications.items():
                if status in _FAILED:
                    raise ClusterError(f"the {name} application failed: {message[:400]}; logs: {self.state.temp_dir}")
            if applications and all(status == "RUNNING" for status, _ in applications.values()):
                if answers(self.grpc_address):
                    return
            self._watch.check(said)
            time.sleep(0.3)


def serve_config(
    path: pathlib.Path,
    ports: Ports,
    checkpoint: str,
    args: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    host: str = LOOPBACK,
) -> dict[str, Any]:
    """The Serve configuration file with this cluster's host, ports, checkpoint, settings and options."""
    config = copy.deepcopy(yaml.safe_load(path.read_text(encoding="utf8")))
    services = {"grpc_servicer_functions": ["cluster.ingress.add_services_to_server"]}
    config["grpc_options"] = {**services, **(config.get("grpc_options") or {}), "port": ports.grpc}
    config["http_options"] = {**(config.get("http_options") or {}), "host": host, "port": ports.http}
    for application in config["applications"]:
        settings = application["args"] = application.get("args") or {}
        settings["checkpoint"] = checkpoint
        if application["name"] == "gateway":
            settings["network"] = "loopback"
        settings.update(args.get(application["name"], {}))
        laid = (options or {}).get(application["name"])
        if laid and not application.get("deployments"):
            application["deployments"] = [{"name": _DEPLOYMENTS[application["name"]]}]
        for deployment in application.get("deployments") or ():
            deployment.update(laid or {})
    return config


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.local", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verb", choices=("up", "down", "status"))
    parser.add_argument("--checkpoint", help="folder; default: FOCUSLLAVA_CHECKPOINT, then the shipped one")
    parser.add_argument("--host", default=LOOPBACK, help="of `up`: where the public API listens; default: %(default)s")
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


def opened(state: ClusterState) -> list[str]:
    """Lines for a person that say where the cluster listens, and for whom."""
    page = f"try it at {state.openai_url.removesuffix('v1')}; " if state.playground else ""
    lines = [
        f"{page}OpenAI's API at {state.openai_url}",
        f"dashboard {state.dashboard_url} (asks for the token in {state.token_file}), metrics {state.metrics_url}",
    ]
    if state.is_open:
        ports = f"ports {state.ports.grpc} (gRPC) and {state.ports.http} (HTTP) of {state.host}"
        lines.append(f"open to the network: {ports}, without TLS, and without API keys to everybody")
        lines.append(f"the rest is on {LOOPBACK}")
    return lines


def _up(options: argparse.Namespace) -> int:
    places = {"host": options.host, "grpc_port": options.grpc_port, "http_port": options.http_port}
    sizes = placed(options.checkpoint, _say)
    state = LocalCluster(checkpoint=options.checkpoint, **places, **sizes).start(_say).state
    port = "" if state.ports.grpc == DEFAULT_GRPC_PORT else f" --grpc-port {state.ports.grpc}"
    for line in opened(state):
        _say(line)
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
    _say(f"public API {state.grpc_address}")
    for line in opened(state):
        _say(line)
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
