"""A command's parent says how its work ended: what the work returned, or what ended its process."""

import os
import signal
import subprocess
import sys
import time

import pytest

from training.watched import in_a_child

KILLED_WITH_ITS_PARENT = """
import os, time
from training.watched import in_a_child
def work():
    print(os.getpid(), flush=True)
    time.sleep(600)
in_a_child(work, leave=lambda: None)
"""


def test_what_the_work_returned_arrives(tmp_path):
    left = tmp_path / "left"
    ended = in_a_child(lambda: (os.getpid() % 2, "said é"), leave=left.touch)
    assert ended[1] == "said é" and ended[0] in (0, 1) and left.exists()


def test_the_work_runs_elsewhere_and_changes_nothing_here():
    here = []
    assert in_a_child(lambda: here.append(1) or (0, str(os.getpid())), leave=lambda: None) != (0, str(os.getpid()))
    assert here == []


@pytest.mark.parametrize(
    ("end", "code"), [(lambda: os.kill(os.getpid(), signal.SIGKILL), -9), (lambda: os._exit(5), 5), (lambda: 1 / 0, 1)]
)
def test_a_child_that_says_nothing_has_its_exit_code_told(end, code):
    assert in_a_child(end, leave=lambda: None) == code


def test_the_child_ends_with_its_parent():
    parent = subprocess.Popen([sys.executable, "-c", KILLED_WITH_ITS_PARENT], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while os.path.exists(f"/proc/{child}") and time.monotonic() < until:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{child}")


def test_sigterm_reaches_the_child():
    program = KILLED_WITH_ITS_PARENT.replace("in_a_child(work", "print(in_a_child(work").replace("None)", "None))")
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    parent.stdout.readline()
    parent.terminate()
    said, _ = parent.communicate(timeout=20)
    assert said == "-15\n" and parent.returncode == 0
