"""A start that is watched: what its processes listen on, whether they live, and whether they move on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from cluster import checks
from cluster.checks import ClusterError
from cluster.listeners import listeners
from cluster.loopback import addresses
from cluster.ray_head import MARKER, ClusterState
from cluster.watch import HeadDied, StartWatch, check_listeners
from tests.serving_client import pid_of, until
from tests.unit.cluster.test_local import PORTS


@pytest.mark.parametrize(
    "asked, public, expected",
    [
        ("[::]:0", "", ["127.0.0.1:0"]),
        ("[::]:9000", "", ["127.0.0.1:9000"]),
        ("[::]:9000", "192.0.2.7:9000", ["127.0.0.1:9000", "192.0.2.7:9000"]),
        ("[::]:9000", "[fd00::7]:9000", ["127.0.0.1:9000", "[fd00::7]:9000"]),
        ("[::]:9000", "0.0.0.0:9000", ["0.0.0.0:9000"]),
        ("[::]:9000", "[::]:9000", ["[::]:9000"]),
        ("[::]:0", "0.0.0.0:9000", ["127.0.0.1:0"]),
        ("0.0.0.0:9001", "0.0.0.0:9000", ["127.0.0.1:9001"]),
    ],
)
def test_only_the_public_port_leaves_the_loopback_interface(asked, public, expected):
    assert addresses(asked, public) == expected


GRPC_SERVER = """
import asyncio, sys, time
import grpc.aio
from cluster.loopback import keep_servers_local

async def serve():
    server = grpc.aio.server()
    server.add_insecure_port("[::]:0")  # as Ray Serve does
    await server.start()
    print("ready", flush=True)
    await asyncio.sleep(60)

if sys.argv[1] == "hooked":
    keep_servers_local()
asyncio.run(serve())
"""


@pytest.mark.parametrize("hook, local_", [("hooked", True), ("bare", False)])
def test_the_hook_keeps_a_grpc_server_on_the_loopback_interface(tmp_path, hook, local_):
    state = ClusterState(temp_dir=str(tmp_path), checkpoint="x", ports=PORTS)
    with subprocess.Popen(
        [sys.executable, "-c", GRPC_SERVER, hook],
        stdout=subprocess.PIPE,
        env={**os.environ, MARKER: state.temp_dir, "PYTHONPATH": str(checks.REPOSITORY)},
    ) as server:
        try:
            assert server.stdout.readline() == b"ready\n"
            (found,) = listeners(state.pids())
            assert (found.pid, found.is_local) == (server.pid, local_)
            if local_:
                check_listeners(state)
            else:
                with pytest.raises(ClusterError, match=f"could reach port {found.port} of python.* at ::"):
                    check_listeners(state)
        finally:
            server.kill()


@pytest.mark.parametrize("address, local_", [("127.0.0.1", True), ("0.0.0.0", False), ("127.0.0.2", True)])
def test_listeners_are_read_from_the_kernel(address, local_):
    with socket.socket() as listener, socket.socket():
        listener.bind((address, 0))
        listener.listen()
        found = {each.port: each for each in listeners([os.getpid()])}[listener.getsockname()[1]]
        assert (found.address, found.is_local, found.pid) == (address, local_, os.getpid())


def test_a_descriptor_that_is_closed_meanwhile_hides_no_listener(monkeypatch):
    readlink, closed = os.readlink, []

    def readlink_of_others(path):
        if not closed:
            closed.append(path)
            raise FileNotFoundError(path)
        return readlink(path)

    with open(os.devnull), socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        monkeypatch.setattr(os, "readlink", readlink_of_others)
        assert listener.getsockname()[1] in {each.port for each in listeners([os.getpid()])}
    assert closed


RAYLET_DIED = (  # a line of Ray 2.60
    "[2026-11-30 00:24:47,093 C 4232 4232] (raylet) node_manager.cc:3576:  An unexpected system state has occurred. "
    "You have likely discovered a bug in Ray. Check failed: statussetor3576.has_value() Timed out waiting for file "
    "/x/metrics_agent_port_a06f\n*** StackTrace Information ***\n    @ 0x5651 raylet(+0x1) [0x2]\n"
)


def test_a_dead_head_is_noticed_and_its_log_explains_it(tmp_path):
    state = ClusterState(temp_dir=str(tmp_path), checkpoint="x", ports=PORTS)
    with subprocess.Popen(["sleep", "60"]) as head:
        watch = StartWatch(state, head, timeout_s=60)
        watch.check()
        head.kill()
        head.wait()
        (tmp_path / "ray-start.log").write_text("Exception: The current node timed out during startup.\n\n")
        with pytest.raises(HeadDied, match="Ray died: Exception: The current node timed out .*; logs: "):
            watch.check()
        logs = tmp_path / "ray" / "session_latest" / "logs"
        logs.mkdir(parents=True)
        (logs / "raylet.err").write_text(RAYLET_DIED)
        with pytest.raises(
            HeadDied, match="Ray died: raylet.err: Timed out waiting for file /x/metrics_agent_port_a06f;"
        ):
            watch.check()


def test_a_dead_raylet_is_noticed_though_nobody_saw_it_alive(tmp_path):
    state = ClusterState(temp_dir=str(tmp_path), checkpoint="x", ports=PORTS)
    (tmp_path / "raylet").symlink_to("/bin/true")
    program = f"import subprocess, time; p = subprocess.Popen(['{tmp_path}/raylet']); print(p.pid, flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as head:
        try:
            head.stdout.readline()
            watch = StartWatch(state, head, timeout_s=60)
            with pytest.raises(HeadDied, match="Ray's raylet died: no output; logs: "):
                for _ in range(100):  # /bin/true takes a moment
                    watch.check()
                    time.sleep(0.1)
        finally:
            head.kill()


def test_a_start_has_as_long_as_it_makes_progress(tmp_path):
    state = ClusterState(temp_dir=str(tmp_path), checkpoint="x", ports=PORTS)
    program = "input(); held = b'x' * 2**27; print('held', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    now = [0.0]
    with subprocess.Popen([sys.executable, "-c", program], env={**os.environ, MARKER: state.temp_dir}, **pipes) as head:
        try:
            watch = StartWatch(state, head, timeout_s=300, clock=lambda: now[0])
            watch.check("a")
            now[0] = 299
            head.stdin.write(b"\n")
            head.stdin.flush()
            assert head.stdout.readline() == b"held\n"
            watch.check("a")  # memory that grows is progress
            now[0] = 598
            watch.check("b")  # and so is another state
            now[0] = 897
            watch.check("b")
            now[0] = 899
            with pytest.raises(ClusterError, match=r"no progress for 300 s \(b\); logs: "):
                watch.check("b")
        finally:
            head.kill()


def test_processes_that_write_over_their_environment_are_found_by_their_parents(tmp_path):
    state = ClusterState(temp_dir=str(tmp_path), checkpoint="x", ports=PORTS)
    program = "env -i sleep 60 & echo $!; wait"
    environment = {**os.environ, MARKER: state.temp_dir}
    with subprocess.Popen(["sh", "-c", program], env=environment, stdout=subprocess.PIPE) as parent:
        try:
            child = int(parent.stdout.readline())
            assert set(state.pids()) == {parent.pid, child}
            assert until(lambda: pid_of(state, "sleep") == child, 10)  # it is the shell's fork, then env, then sleep
        finally:
            os.kill(child, signal.SIGKILL)
