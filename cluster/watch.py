"""The watch over a cluster that starts: whether its head lives, whether it moves on, and what it opened."""

from __future__ import annotations

import os
import pathlib
import subprocess
import time
from collections.abc import Callable

from cluster.checks import ClusterError
from cluster.listeners import Listener, listeners
from cluster.ray_head import ClusterState

_GROWTH_BYTES = 32 * 2**20


class HeadDied(ClusterError):
    """Ray's head, or the raylet under it, ended while somebody waited for it."""


class StartWatch:
    """Watches a start, asked again and again while it is waited for; one that moves on may take as long as it needs.

    It moves on when what it says of itself changes, or when its processes take more memory than ever before, as while
    they import or load weights.
    """

    def __init__(
        self,
        state: ClusterState,
        head: subprocess.Popen[bytes],
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._state, self._head, self._timeout_s, self._clock = state, head, timeout_s, clock
        self._raylet_seen = False
        self._said, self._peak_bytes = "", 0
        self._moved_at = clock()

    def check(self, said: str = "") -> None:
        """said: what is known of the start.

        Raises:
            HeadDied: with the line of the logs that explains it.
            ClusterError: nothing changed for `timeout_s`.
        """
        self._check_head()
        used = sum(map(_resident_bytes, self._state.pids()))
        now = self._clock()
        if said != self._said or used > self._peak_bytes + _GROWTH_BYTES:
            self._said, self._peak_bytes, self._moved_at = said, max(used, self._peak_bytes), now
        if now > self._moved_at + self._timeout_s:
            known = f" ({said})" if said else ""
            raise ClusterError(f"no progress for {self._timeout_s:.0f} s{known}; logs: {self._state.temp_dir}")

    def _check_head(self) -> None:
        raylets = _states_of_children(self._head.pid, "raylet")
        dead = "Z" in raylets or (self._raylet_seen and not raylets)
        self._raylet_seen = self._raylet_seen or bool(raylets)
        if dead or self._head.poll() is not None:
            who = "Ray's raylet" if dead else "Ray"
            raise HeadDied(f"{who} died: {self._state.last_words()}; logs: {self._state.temp_dir}")


def check_listeners(state: ClusterState) -> None:
    """Raises ClusterError when a process of the cluster can be reached from elsewhere, but for the ports of `host`."""
    public = {state.ports.grpc, state.ports.http} if state.is_open else set()
    open_ = [each for each in listeners(state.pids()) if not each.is_local and each.port not in public]
    if open_:
        raise ClusterError(f"not served: other machines could reach {', '.join(map(_shown, open_))}")


def _shown(each: Listener) -> str:
    return f"port {each.port} of {each.process} at {each.address}"


def _states_of_children(pid: int, program: str) -> list[str]:
    """The kernel's letter for each child of a process that runs this program; "Z" has ended and was not waited for."""
    found = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:  # ended meanwhile
            continue
        state, parent = rest.split()[:2]
        if int(parent) == pid and name.partition("(")[2] == program:
            found.append(state)
    return found


def _resident_bytes(pid: int) -> int:
    try:
        pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
