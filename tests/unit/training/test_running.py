"""One command trains in a folder at a time, and the next one waits for what a killed one has left."""

import os
import signal
import subprocess
import sys

import pytest

from services.common.errors import InvalidInput
from training.running import the_only_command

WORKER = """
import pathlib, sys, time
from training.running import begin_worker
begin_worker(pathlib.Path(sys.argv[1]))
print("begun", flush=True)
time.sleep(600)
"""


def test_a_second_command_is_refused_and_a_later_one_goes_on(tmp_path):
    with the_only_command(tmp_path / "n"):
        with pytest.raises(InvalidInput, match="name: 'n' is being trained by another command in .*/n: wait until"):
            with the_only_command(tmp_path / "n", patience=0.2):
                pass
        with the_only_command(tmp_path / "other", patience=0.2):
            pass
    with the_only_command(tmp_path / "n", patience=0.2):
        pass


def test_a_command_waits_until_the_workers_of_a_killed_one_have_ended(tmp_path):
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert worker.stdout.readline() == "begun\n"
    with pytest.raises(InvalidInput, match="another command"):
        with the_only_command(tmp_path, patience=0.2):
            pass
    os.kill(worker.pid, signal.SIGKILL)
    with the_only_command(tmp_path):
        assert worker.wait(0.5) == -signal.SIGKILL
