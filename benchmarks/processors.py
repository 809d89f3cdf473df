"""Processor time of a cluster's processes by the part that they play, read from /proc."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping

ROLES = {
    "ray::ServeReplica:gateway": "gateway",
    "ray::ServeReplica:encoder": "encoder",
    "ray::ServeReplica:llm": "llm",
    "ray::ProxyActor": "proxy",
}
"""The beginning of a process's title -> its part; a second gateway begins alike. What else Ray runs is "ray"."""
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")

Used = dict[tuple[str, int], float]
"""(Part, thread) -> seconds of processor time so far."""


def processor_seconds(pids: list[int]) -> Used:
    """Seconds that each thread of these processes has used; threads that end are lost from the sum."""
    used: Used = {}
    for pid in pids:
        try:
            title = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            role = next((role for beginning, role in ROLES.items() if title.startswith(beginning)), "ray")
            for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
                user, system = (task / "stat").read_text().rpartition(")")[2].split()[11:13]
                used[role, int(task.name)] = (int(user) + int(system)) * _TICK_S
        except OSError:  # ended meanwhile
            continue
    return used


def spent(before: Mapping[tuple[str, int], float], after: Mapping[tuple[str, int], float]) -> dict[str, float]:
    """Seconds by part from `before` to `after`.

    The thread of a stage that was busiest is its model's, and counts as "llm model" or "encoder model".
    """
    by_thread = {key: seconds - before.get(key, 0.0) for key, seconds in after.items()}
    parts = dict.fromkeys(("gateway", "proxy", "llm", "llm model", "encoder", "encoder model", "ray"), 0.0)
    busiest = {
        role: max((key for key in by_thread if key[0] == role), key=by_thread.__getitem__, default=None)
        for role in ("llm", "encoder")
    }
    for key, seconds in by_thread.items():
        parts[f"{key[0]} model" if key == busiest.get(key[0]) else key[0]] += seconds
    return parts
