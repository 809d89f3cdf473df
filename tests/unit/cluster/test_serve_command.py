"""`focusllava serve` around a cluster that starts no Ray: what stops it, and which checkpoint it takes."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from cluster.interrupts import SIGNALS
from focusllava.cli import main
from services.checkpoint import finding

SCRIPT = """
import os, pathlib, signal, sys, time, types
import cluster.commands, cluster.local

class Cluster:
    dashboard_url = metrics_url = grpc_address = openai_url = "somewhere"

    def __init__(self, *, host, **_):
        assert host == "127.0.0.1"
        self.state = types.SimpleNamespace(temp_dir="/the/logs", pids=self.pids)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        time.sleep(0.5)  # stopping takes time, in which more signals may come
        say("stopped")

    def start(self, progress):
        say("started")

    def pids(self):
        return [] if DEAD.exists() else [1]

    def stop(self, keep_logs):
        say(f"keeps logs: {keep_logs}")

def say(line):
    with open(LOG, "a") as log:
        print(line, file=log)

DEAD, LOG = pathlib.Path(sys.argv[1]), sys.argv[2]
cluster.local.LocalCluster = Cluster
# What is placed where is test_placing.py's; here it would only bring torch, in each of these processes.
placement = types.SimpleNamespace(lines=(), cluster_arguments={})
sys.modules["cluster.placing"] = types.SimpleNamespace(Wishes=dict, place=lambda *_: placement)
cluster.local.opened = lambda state: ["OpenAI's API somewhere"]
cluster.commands.POLL_S = 0.1
from focusllava.cli import main
sys.exit(main(["serve"]))
"""


def set_signals(ignoring: signal.Signals | None) -> None:
    """A shell starts what runs in its background with SIGINT ignored, and so the tests."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN if number == ignoring else signal.SIG_DFL)


class Served:
    """The command in a process of its own."""

    def __init__(self, folder: pathlib.Path, *, ignoring: signal.Signals | None = None, terminal: int | None = None):
        self.dead, self._log = folder / "dead", folder / "log"
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(self.dead), str(self._log)],
            stdout=subprocess.PIPE if terminal is None else terminal,
            stderr=subprocess.PIPE if terminal is None else terminal,
            preexec_fn=lambda: set_signals(ignoring),
            text=True,
        )

    def log(self) -> list[str]:
        return self._log.read_text().split("\n")[:-1] if self._log.exists() else []

    def wait_for_start(self) -> None:
        while "started" not in self.log():
            assert self.process.poll() is None, self.process.communicate()
            try:
                self.process.wait(0.1)
            except subprocess.TimeoutExpired:
                pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_stops_the_cluster_and_more_do_not_disturb_that(
    tmp_path: pathlib.Path, number: signal.Signals
) -> None:
    served = Served(tmp_path)
    served.wait_for_start()
    served.process.send_signal(number)
    try:
        served.process.wait(0.25)
    except subprocess.TimeoutExpired:
        served.process.send_signal(number)
    out, err = served.process.communicate(timeout=30)
    assert served.log() == ["started", "stopped"] and served.process.returncode == 0
    assert out.endswith("stopping\n") and err == ""


def test_a_terminal_that_is_gone_stops_it_too(tmp_path: pathlib.Path) -> None:
    master, terminal = os.openpty()
    served = Served(tmp_path, terminal=terminal)
    os.close(terminal)
    served.wait_for_start()
    os.close(master)  # what is printed from now on fails
    served.process.send_signal(signal.SIGHUP)
    assert served.process.wait(30) == 0 and served.log() == ["started", "stopped"]


def test_nohup_is_heard(tmp_path: pathlib.Path) -> None:
    served = Served(tmp_path, ignoring=signal.SIGHUP)
    served.wait_for_start()
    served.process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        served.process.wait(0.5)
    served.process.terminate()
    served.process.communicate(timeout=30)
    assert served.log() == ["started", "stopped"]


def test_the_end_of_ray_ends_it(tmp_path: pathlib.Path) -> None:
    served = Served(tmp_path)
    served.wait_for_start()
    served.dead.touch()
    _, err = served.process.communicate(timeout=30)
    assert served.process.returncode == 1 and "Ray has ended" in err and "/the/logs" in err and err.count("\n") == 1
    assert served.log() == ["started", "keeps logs: True", "stopped"]


def test_no_checkpoint_in_an_installed_package(tmp_path: pathlib.Path, monkeypatch, capsys) -> None:
    monkeypatch.delenv("FOCUSLLAVA_CHECKPOINT", raising=False)
    monkeypatch.setattr(finding, "DEFAULT_CHECKPOINT", tmp_path / "missing")
    image = tmp_path / "image.png"
    image.write_bytes(b"png")
    for arguments in (["serve"], ["explain", str(image), "What?", "-o", str(tmp_path / "focus.png")]):
        assert main(arguments) == 3
        err = capsys.readouterr().err
        assert "only in the source tree" in err and "FOCUSLLAVA_CHECKPOINT" in err and err.count("\n") == 1
    assert main(["serve", str(tmp_path)]) == 3
    assert f"no config.json in {tmp_path}" in capsys.readouterr().err
    assert main(["serve", "--help"]) == 0
    assert "in the source tree" in " ".join(capsys.readouterr().out.split())
