"""A soak: an open loop at a share of the capacity for many minutes, while memory, files and KV pages are read.

Each figure's slope over the second half, by least squares, says whether it grows; the first half fills caches.
"""

from __future__ import annotations

import argparse
import asyncio
import threading
import time
from collections import Counter
from collections.abc import Sequence

from benchmarks.clusters import ONE_REPLICA
from benchmarks.measure import print_table
from benchmarks.open_loop import Client, Goal, Outcome, Target, poisson_times, summary
from benchmarks.questions import Posters
from benchmarks.storm.burst import capacity
from benchmarks.storm.vitals import Figures, vitals, wait_until_idle
from cluster.local import LocalCluster

PIECE_S = 20.0
"""Length of the open loops that follow each other."""
SAMPLE_S = 5.0
GOAL = Goal(ttft_s=1.0, tpot_s=0.25)


class Watch:
    """Reads the cluster's vitals every few seconds, on a thread of its own."""

    def __init__(self, cluster: LocalCluster):
        self._cluster, self._ended = cluster, threading.Event()
        self.samples: list[tuple[float, Figures]] = []
        """(Seconds, figures)."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        began = time.monotonic()
        while not self._ended.wait(SAMPLE_S):
            self.samples.append((time.monotonic() - began, vitals(self._cluster)))


async def pieces(target: Target, work: Posters, rate: float, seconds: float) -> list[Outcome]:
    """Open loops, one after the other, for so many seconds."""
    client, outcomes, end, seed = Client(target, 120), list[Outcome](), time.monotonic() + seconds, 0
    try:
        while time.monotonic() < end:
            seed += 1
            times = poisson_times(rate, PIECE_S, seed)
            outcomes += await client.open_loop(work.questions(len(times), seed), times)
            print(f"\rsoak: {end - time.monotonic():.0f} s left, {len(outcomes)} requests", end="", flush=True)
    finally:
        await client.close()
    print("\r" + " " * 60 + "\r", end="")
    return outcomes


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The rise a second of the line that fits best; 0 for fewer than two points."""
    if len(points) < 2:
        return 0.0
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def run(options: argparse.Namespace) -> list[str]:
    """Prints what happened; returns what should not have."""
    names = ("gateway", "encoder", "llm")
    args = {"gateway": {"cache_bytes": options.cache_mb * 2**20}}
    with LocalCluster(grpc_port=0, timeout_s=400, options=dict.fromkeys(names, ONE_REPLICA), args=args) as cluster:
        cluster.start()
        return against(cluster, options)


def against(cluster: LocalCluster, options: argparse.Namespace) -> list[str]:
    """Does what `run` does, to a cluster that runs."""
    work = Posters(20, 0.75)
    asyncio.run(capacity(cluster, work))
    rate = options.load * asyncio.run(capacity(cluster, work))
    watch = Watch(cluster)
    outcomes = asyncio.run(pieces(Target(address=cluster.grpc_address), work, rate, 60 * options.minutes))
    watch.end()
    left = wait_until_idle(cluster)
    figures = summary(outcomes, 60 * options.minutes, GOAL)
    codes = Counter(each.code for each in outcomes)
    print(f"{options.minutes:g} minutes at {rate:.1f} requests/s, {options.load:.0%} of the capacity: "
          f"{', '.join(f'{count} {code}' for code, count in codes.items())}; "
          f"TTFT p50 {figures['ttft_p50_ms']:.0f} ms, p99 {figures['ttft_p99_ms']:.0f} ms")  # fmt: skip
    faults = [f"{count} requests ended with {code}" for code, count in codes.items() if code != "OK"]
    return faults + grown(watch.samples, options) + [f"at the end {t} is {a:g}" for t, a in left.items()]


def grown(samples: Sequence[tuple[float, Figures]], options: argparse.Namespace) -> list[str]:
    """Prints each figure with its slope; returns those that grow faster than they may."""
    second_half = samples[len(samples) // 2 :]
    rows, faults = [], []
    for title in samples[0][1]:
        values = [figures.get(title, 0.0) for _, figures in samples]
        an_hour = 3600 * slope([(at, figures.get(title, 0.0)) for at, figures in second_half])
        rows.append([title, f"{values[0]:.0f}", f"{values[len(values) // 2]:.0f}", f"{values[-1]:.0f}",
                     f"{max(values):.0f}", f"{an_hour:+.0f}"])  # fmt: skip
        most = {"MiB": options.most_mb_an_hour, "files": options.most_files_an_hour}.get(title.split()[-1])
        if most is not None and not title.startswith("held") and an_hour > most:
            faults.append(f"{title} grows by {an_hour:.0f} an hour")
    print_table(("", "first", "middle", "last", "most", "slope of the second half, an hour"), rows)
    return faults


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--load", type=float, default=0.8, help="share of the capacity")
    parser.add_argument(
        "--cache-mb", type=int, default=64, help="the gateway's cache, which is to be full by half-time"
    )
    parser.add_argument("--most-mb-an-hour", type=float, default=200)
    parser.add_argument("--most-files-an-hour", type=float, default=20)
