"""What every benchmark shares: cores, turns, a closed loop of requests, percentiles, tables, results as JSON.

Standard library only: it also runs in the rivals' environments.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What one step of a peer brought to one request."""

    request: int
    new_tokens: int
    finished: bool = False


class Peer(Protocol):
    """Something that answers requests, driven by `closed_loop`."""

    def add(self, request: int) -> None: ...

    def step(self) -> Iterable[Progress]: ...


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """One request; seconds on `time.perf_counter`'s clock."""

    request: int
    added: float
    token_times: tuple[float, ...]
    """When each token was seen; a step that brings several stamps them alike."""

    @property
    def ttft_s(self) -> float:
        """Time to first token, from the image's bytes."""
        return self.token_times[0] - self.added

    @property
    def tpot_s(self) -> float:
        """Mean time of each output token after the first; NaN for an answer of one token."""
        if len(self.token_times) < 2:
            return math.nan
        return (self.token_times[-1] - self.token_times[0]) / (len(self.token_times) - 1)


def closed_loop(peer: Peer, requests: Sequence[int], concurrency: int) -> tuple[float, list[Timeline]]:
    """Keeps `concurrency` requests in flight until all are answered; returns seconds in all and each one's timeline."""
    queue = list(reversed(requests))
    added: dict[int, float] = {}
    tokens: dict[int, list[float]] = {}
    finished: list[Timeline] = []
    began = time.perf_counter()
    while len(finished) < len(requests):
        while queue and len(added) - len(finished) < concurrency:
            request = queue.pop()
            added[request], tokens[request] = time.perf_counter(), []
            peer.add(request)
        for progress in peer.step():
            tokens[progress.request] += [time.perf_counter()] * progress.new_tokens
            if progress.finished:
                times = tuple(tokens[progress.request])
                finished.append(Timeline(request=progress.request, added=added[progress.request], token_times=times))
    return time.perf_counter() - began, finished


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Where a benchmark runs, in which dtype, and the file that it writes."""
    parser.add_argument("--cores", type=parse_cores, default=tuple(range(2)), help='such as "0-1"')
    parser.add_argument("--device", default="cpu", help='"cuda" for a GPU')
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                        help="of all peers; what the device multiplies fastest in when left out")  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path)


def percentile(values: Iterable[float], share: float) -> float:
    """Linear interpolation between ranks; NaN values are left out, NaN when none are left."""
    ordered = sorted(value for value in values if not math.isnan(value))
    if not ordered:
        return math.nan
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median(values: Iterable[float]) -> float:
    return percentile(values, 0.5)


def summary(seconds: float, timelines: Sequence[Timeline]) -> dict[str, float]:
    """One turn of one peer, as the tables show it."""
    tokens = sum(len(timeline.token_times) for timeline in timelines)
    ttft, tpot = [t.ttft_s for t in timelines], [t.tpot_s for t in timelines]
    return {
        "seconds": seconds,
        "requests_per_s": len(timelines) / seconds,
        "output_tokens_per_s": tokens / seconds,
        "ttft_p50_ms": 1e3 * percentile(ttft, 0.5),
        "ttft_p99_ms": 1e3 * percentile(ttft, 0.99),
        "tpot_p50_ms": 1e3 * percentile(tpot, 0.5),
        "tpot_p99_ms": 1e3 * percentile(tpot, 0.99),
    }


def take_turns(turns: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> dict[str, list[Any]]:
    """Calls every peer once a round, each round starting with the next one; the first `warm_up` rounds are dropped.

    What else the machine does then falls on all alike, and nobody always follows the same neighbour.
    """
    names = list(turns)
    results: dict[str, list[Any]] = {name: [] for name in names}
    for number in range(-warm_up, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            print(f"\rbench: round {max(number + 1, 0)} of {rounds}, {name:<16}", end="", flush=True)
            result = turns[name]()
            if number >= 0:
                results[name].append(result)
    print("\r" + " " * 60 + "\r", end="", flush=True)
    return results


def parse_cores(text: str) -> tuple[int, ...]:
    """ "0-1,4" to (0, 1, 4). Raises ValueError."""
    cores: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        cores += range(int(first), int(last or first) + 1)
    if not cores:
        raise ValueError(f"{text!r} names no core")
    return tuple(dict.fromkeys(cores))


def pin(cores: Sequence[int]) -> None:
    """Binds this process and all that it starts to `cores`; OpenMP takes as many threads."""
    os.sched_setaffinity(0, cores)
    os.environ["OMP_NUM_THREADS"] = str(len(cores))


def machine(cores: Sequence[int], packages: Sequence[str] = ("torch", "transformers")) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "processor": _processor(),
        "cores_of_machine": os.cpu_count(),
        "cores_used": list(cores),
        "load_average_1min": os.getloadavg()[0],
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text("utf8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def median_of(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each figure over a peer's turns."""
    return {name: median(result[name] for result in results) for name in (results[0] if results else {})}


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and greatest of the ratios of two peers' figures in the same rounds."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns padded to their widest cell: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))))


def write_results(benchmark: str, content: Mapping[str, Any], out: pathlib.Path | str) -> pathlib.Path:
    """Writes `content` with the load at the end to the file `out`, a name meaning benchmarks/results/NAME.json."""
    path = RESULTS / f"{out}.json" if isinstance(out, str) else out
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"benchmark": benchmark, **content, "load_average_1min_at_end": os.getloadavg()[0]}
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf8")
    print(f"\nwrote {path}")
    return path
