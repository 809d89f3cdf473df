"""Every signal that asks a command to end does what Ctrl-C does, so that what it started is stopped."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """Raises KeyboardInterrupt inside the block at the first of SIGNALS; later ones cannot disturb the stopping.

    Main thread only. A signal that is ignored already stays so, as `nohup` asks for.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, _interrupt_once)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt_once(*_: object) -> NoReturn:
    for number in SIGNALS:  # a closing terminal sends SIGHUP twice
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
