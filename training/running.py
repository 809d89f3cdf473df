"""Who trains in a run's folder: one command at a time, and not before the workers of a killed one have ended.

Locks on files of the folder say it; the system gives them back when their process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import time
from collections.abc import Iterator

from services.common.errors import InvalidInput

COMMAND, WORKERS = ".command.lock", ".workers.lock"
PATIENCE = 120.0
"""Seconds that a command waits for what a killed one has left to end."""


@contextlib.contextmanager
def the_only_command(folder: pathlib.Path, patience: float = PATIENCE) -> Iterator[None]:
    """Nobody else trains in the folder within this block.

    Raises InvalidInput where another command, or a worker of one, still runs after so many seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + patience
    held = _lock(folder / COMMAND, fcntl.LOCK_EX, until)
    try:
        os.close(_lock(folder / WORKERS, fcntl.LOCK_EX, until))
        yield
    finally:
        os.close(held)


def begin_worker(folder: pathlib.Path) -> None:
    """Has a next command wait until this process has ended."""
    folder.mkdir(parents=True, exist_ok=True)
    _lock(folder / WORKERS, fcntl.LOCK_SH, time.monotonic() + PATIENCE)


def _lock(path: pathlib.Path, kind: int, until: float) -> int:
    """The descriptor that holds the lock; what this process starts does not have it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > until:
                os.close(descriptor)
                wrong = f"{path.parent.name!r} is being trained by another command in {path.parent}"
                raise InvalidInput(f"{wrong}: wait until it ends, or take another name", field="name") from None
            time.sleep(0.1)
