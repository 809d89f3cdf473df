"""A command's work in a child of its own, so that something is left to say how it ended, whatever ended it.

Ray ends the process that speaks with it, without a word of ours, once its GCS is gone for long.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

Ended = tuple[int, str]
"""An exit code, and the command's last message."""


def in_a_child(work: Callable[[], Ended], *, leave: Callable[[], None]) -> Ended | int:
    """What `work` returned in a child of this process; where the child was ended before, its exit code, below 0 the
    signal.

    The child calls `leave` before it ends by itself, and is ended with this process. SIGTERM is passed on to it; SIGINT
    a terminal sends to both.
    """
    result, told = os.pipe()
    held, holds = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(result)
        os.close(holds)
        _be_the_child(work, leave, told, held)
    os.close(told)
    os.close(held)
    with _passed_on(child), open(result, encoding="utf8") as text:
        said = text.read()
        _, status = os.waitpid(child, 0)
    os.close(holds)
    if not said:
        return os.waitstatus_to_exitcode(status)
    code, message = json.loads(said)
    return code, message


def _be_the_child(work: Callable[[], Ended], leave: Callable[[], None], told: int, held: int) -> NoReturn:
    threading.Thread(target=_end_with_parent, args=(held,), daemon=True).start()
    code = 1
    try:
        code, message = work()
        os.write(told, json.dumps((code, message)).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        leave()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end_with_parent(held: int) -> None:
    os.read(held, 1)  # returns once the parent's end is closed, as it is when the parent is killed
    os._exit(1)


@contextlib.contextmanager
def _passed_on(child: int) -> Iterator[None]:
    """SIGTERM goes to the child within this block, and SIGINT is left to it."""

    def pass_on(number: int, _: Any) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    handlers = {signal.SIGTERM: pass_on, signal.SIGINT: lambda number, frame: None}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
