"""What the processes of a cluster hold: memory, open files, KV pages, bytes of requests; and when that is nothing."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import time
import urllib.request
from collections import defaultdict
from collections.abc import Mapping

from benchmarks.processors import ROLES
from cluster.local import LocalCluster

Figures = dict[str, float]
GAUGES = {
    "requests in flight": "focusllava_requests_in_flight",
    "waiting at gateway": "focusllava_waiting_at_gateway",
    "held MiB": "focusllava_held_bytes",
    "calls at encoder": "focusllava_encoder_calls",
    "calls at llm": "focusllava_llm_calls",
    "running at llm": "focusllava_running_requests",
    "KV pages used": "focusllava_kv_pages_used",
}
"""What is 0 where nothing is asked, and the metric that says it."""
_CACHED = "focusllava_kv_pages_cached"
_PAGE = os.sysconf("SC_PAGE_SIZE")


def replicas(cluster: LocalCluster) -> dict[int, str]:
    """The processes that answer requests, with the part that each plays."""
    found = {}
    for pid in cluster.state.pids():
        with contextlib.suppress(OSError):
            title = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            role = next((role for beginning, role in ROLES.items() if title.startswith(beginning)), None)
            if role:
                found[pid] = role
    return found


def gauges(cluster: LocalCluster) -> Figures:
    """Sums over the replicas, as Ray's metrics have them: up to some seconds old."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(cluster.metrics_url, timeout=30) as response:
        text = response.read().decode()
    totals: defaultdict[str, float] = defaultdict(float)
    for name, value in re.findall(r"^ray_(focusllava_\w+)(?:\{[^\n]*\})? (\S+)$", text, re.M):
        totals[name] += float(value)
    figures = {title: totals[name] for title, name in GAUGES.items()}
    figures["held MiB"] /= 2**20
    figures["KV pages cached"] = totals[_CACHED]
    return figures


def memory_and_files(cluster: LocalCluster) -> Figures:
    """Resident MiB and open files of each part; shared memory that a process has touched counts in it."""
    figures: defaultdict[str, float] = defaultdict(float)
    for pid, role in replicas(cluster).items():
        with contextlib.suppress(OSError):
            pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
            figures[f"{role} MiB"] += pages * _PAGE / 2**20
            figures[f"{role} files"] += len(os.listdir(f"/proc/{pid}/fd"))
    return dict(figures)


def vitals(cluster: LocalCluster) -> Figures:
    """All of it."""
    return {**memory_and_files(cluster), **gauges(cluster)}


def busy(figures: Mapping[str, float]) -> dict[str, float]:
    """What is not at its level."""
    return {title: figures[title] for title in GAUGES if figures[title]}


def wait_until_idle(cluster: LocalCluster, seconds: float = 60) -> dict[str, float]:
    """Waits until nothing runs, waits or is held. Returns what still does after so many seconds."""
    end = time.monotonic() + seconds
    while (left := busy(gauges(cluster))) and time.monotonic() < end:
        time.sleep(1)
    return left
