"""Goodput of the served pipeline: requests come at moments of their own, faster or slower than it can answer them.

    python -m benchmarks.serving checkpoints/focusllava-tiny                  # starts a cluster on this machine
    python -m benchmarks.serving --target HOST:PORT --work photos --sizes 672x672 336x1008 --tokens 64

First a closed loop with more and more requests in flight finds the capacity, then an open loop offers multiples of it
(or --rates, in requests a second). Goodput is answers a second within --ttft-ms and --tpot-ms. Two settings are
compared in one run, in rounds that take turns: --samplers-off, --against another server, or --change, which starts a
second gateway with other args (of a stage: a second one of that stage, too) beside the first:

    --change '{"gateway": {"load_compression": {"map_share": [0.5, 0.2]}}}'
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import math
import pathlib
import shlex
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from benchmarks.clusters import CHANGED, ONE_REPLICA, changed_config
from benchmarks.measure import RESULTS, machine, median_of, print_table, ratio_of, take_turns, write_results
from benchmarks.open_loop import Client, Goal, Outcome, Target, burst_times, summary
from benchmarks.processors import processor_seconds, spent
from benchmarks.questions import Photos, Posters, Question, Work, size_hw
from cluster.interrupts import signals_interrupt
from cluster.local import SERVE_CONFIG, LocalCluster
from focusllava import AsyncFocusClient

SAMPLERS_OFF = {"vision_sampler": False, "text_sampler": False}
CPU = "ms of "
"""How the names of the figures begin that are processor time of a part."""
LATE_MS = 50.0
"""A generator that sends later than this was too slow itself."""


class Bench:
    """The same questions to several targets, in turns."""

    def __init__(
        self,
        targets: Mapping[str, Target],
        work: Work,
        goal: Goal,
        timeout_s: float,
        pids: Callable[[], list[int]] = lambda: [],
    ):
        """pids: the servers' processes, where they are on this machine."""
        self._runner, self._work, self._goal = asyncio.Runner(), work, goal
        self._timeout_s, self._pids = timeout_s, pids
        self.targets = targets

    def warm_up(self) -> None:
        """Has every target see each image of the pool."""
        for target in self.targets.values():
            questions = self._work.questions(4 * len(self._work.images), seed=0)
            self._runner.run(self._closed(target, questions, 4))

    def closed(self, target: Target, concurrency: int, requests: int) -> dict[str, float]:
        """A turn with so many requests in flight, each asked when another has ended."""
        return self._runner.run(self._closed(target, self._work.questions(requests, concurrency), concurrency))

    async def _closed(self, target: Target, questions: Sequence[Question], concurrency: int) -> dict[str, float]:
        async with self._client(target) as (client, used):
            seconds, outcomes = await client.closed_loop(questions, concurrency)
        return summary(outcomes, seconds, self._goal) | per_request(used, outcomes)

    def open(self, target: Target, times: Sequence[float], seconds: float, seed: int) -> dict[str, float]:
        """A turn with requests at these moments."""
        return self._runner.run(self._open(target, times, seconds, seed))

    async def _open(self, target: Target, times: Sequence[float], seconds: float, seed: int) -> dict[str, float]:
        async with self._client(target) as (client, used):
            began = time.perf_counter()
            outcomes = await client.open_loop(self._work.questions(len(times), seed), times)
            until_last_s = max(seconds, time.perf_counter() - began)
        return summary(outcomes, seconds, self._goal, until_last_s) | per_request(used, outcomes)

    @contextlib.asynccontextmanager
    async def _client(self, target: Target) -> AsyncIterator[tuple[Client, dict[str, float]]]:
        """A client, and a mapping that has each part's seconds of processor time after the block."""
        client, used = Client(target, self._timeout_s), dict[str, float]()
        before, own = processor_seconds(self._pids()), time.process_time()
        try:
            yield client, used
        finally:
            await client.close()
        if before:
            used |= spent(before, processor_seconds(self._pids())) | {"client": time.process_time() - own}


def per_request(used: Mapping[str, float], outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Milliseconds of processor time an answered request, by part."""
    answered = sum(each.code == "OK" for each in outcomes) or math.nan
    return {f"{CPU}{part}": 1e3 * seconds / answered for part, seconds in used.items()}


def sweep(bench: Bench, concurrency: Sequence[int], requests: int) -> dict[int, dict[str, dict[str, float]]]:
    """Closed loops of every target, by requests in flight."""
    found = {}
    for number in concurrency:
        turns = {
            name: functools.partial(bench.closed, target, number, max(requests, 4 * number))
            for name, target in bench.targets.items()
        }
        found[number] = {name: mine[0] for name, mine in take_turns(turns, 1, warm_up=0).items()}
    return found


def offer(bench: Bench, rate: float, burst: int, seconds: float, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Open loops of every target at one rate, in turns; in a round all get the same requests at the same moments."""
    rounds_of = {name: iter(range(rounds)) for name in bench.targets}

    def turn(name: str) -> dict[str, float]:
        seed = 1 + next(rounds_of[name])
        return bench.open(bench.targets[name], burst_times(rate, seconds, burst, seed), seconds, seed)

    return take_turns({name: functools.partial(turn, name) for name in bench.targets}, rounds, warm_up=0)


COLUMNS = {
    "goodput_per_s": ("goodput/s", ".1f"), "answered_per_s": ("answers/s", ".1f"), "score": ("score %", ".1f"),
    "good_score": ("of good", ".1f"), "ttft_p50_ms": ("TTFT p50", ".0f"), "ttft_p99_ms": ("p99, ms", ".0f"),
    "tpot_p50_ms": ("TPOT p50", ".1f"), "tpot_p99_ms": ("p99, ms", ".1f"), "refused": ("refused", ".0f"),
    "failed": ("failed", ".0f"), "cache_hits": ("cache hits %", ".0f"), "visual_tokens": ("visual tokens", ".0f"),
    "level": ("level", ".1f"),
}  # fmt: skip
"""Figure -> its title and format."""


def show(first: Sequence[str], rows: Sequence[tuple[Sequence[str], Mapping[str, float]]]) -> None:
    """Prints a table; rows: the first cells of each, and its figures."""
    titles = [*first, *(title for title, _ in COLUMNS.values())]
    print_table(titles, [[*cells, *(f"{f[c]:{how}}" for c, (_, how) in COLUMNS.items())] for cells, f in rows])
    parts = [name for name in (rows[0][1] if rows else {}) if name.startswith(CPU)]
    if parts:
        print("\nprocessor time, ms a request")
        head = [*first, *(part.removeprefix(CPU) for part in parts)]
        print_table(head, [[*cells, *(f"{figures[part]:.1f}" for part in parts)] for cells, figures in rows])
    late = max((figures["lag_p99_ms"] for _, figures in rows), default=0.0)
    if late > LATE_MS:
        print(f"the generator itself was late, by up to {late:.0f} ms: p99 of a turn's requests")


def goodput_ratios(turns: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, tuple[float, float, float]]:
    """Goodput of each target over the first one's: median, least, greatest of the rounds'. None where it had none."""
    base, *others = turns
    goodput = {name: [turn["goodput_per_s"] for turn in mine] for name, mine in turns.items()}
    if not all(goodput[base]):
        return {}
    return {f"{name}/{base}": ratio_of(goodput[name], goodput[base]) for name in others}


@contextlib.contextmanager
def started(options: argparse.Namespace) -> Iterator[tuple[dict[str, Target], Callable[[], list[int]]]]:
    """A cluster on this machine, one replica an application; and who knows its processes."""
    names = ["gateway", "encoder", "llm"]
    args: dict[str, Any] = json.loads(options.args)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        config = SERVE_CONFIG
        if options.change:
            change = json.loads(options.change)
            content = changed_config(change)
            names = [application["name"] for application in content["applications"]]
            config = pathlib.Path(folder) / "serve.yaml"
            config.write_text(yaml.safe_dump(content), "utf8")
            for name in args.keys() & {name.removesuffix(CHANGED) for name in names if name.endswith(CHANGED)}:
                args[name + CHANGED] = {**args[name], **change.get(name, {})}
        cluster = stack.enter_context(
            LocalCluster(
                checkpoint=options.checkpoint, grpc_port=0, timeout_s=400, config=config, args=args,
                options={name: ONE_REPLICA for name in names},
            )
        )  # fmt: skip
        cluster.start(lambda line: print(f"bench: {line}", flush=True))
        targets = {"as it is": Target(address=cluster.grpc_address)}
        if options.change:
            targets["changed"] = Target(address=cluster.grpc_address, application="gateway" + CHANGED)
        yield targets, cluster.state.pids


@contextlib.contextmanager
def reached(options: argparse.Namespace) -> Iterator[tuple[dict[str, Target], Callable[[], list[int]]]]:
    """Servers that run already."""
    targets = {"as it is": Target(address=options.target, api_key=options.api_key)}
    if options.against:
        targets["against"] = Target(address=options.against, api_key=options.api_key)
    yield targets, lambda: []


async def model_name(target: Target) -> str:
    async with AsyncFocusClient(target.address, api_key=target.api_key, timeout_s=60) as client:
        return (await client.model_info()).name


def asked(words: Sequence[str]) -> str:
    """The command's options as they were typed, without places of this machine and keys."""
    kept, hide = [], False
    for word in words:
        if not hide and word not in ("--out", "--api-key", "--target", "--against"):
            kept.append(word)
        hide = word in ("--out", "--api-key", "--target", "--against")
    return shlex.join(kept)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="folder; the shipped one when left out")
    parser.add_argument("--target", metavar="HOST:PORT", help="a server that runs, in place of a cluster of our own")
    parser.add_argument("--api-key", help="of the target")
    compared = parser.add_mutually_exclusive_group()
    compared.add_argument("--against", metavar="HOST:PORT", help="of --target: another server to compare with")
    compared.add_argument("--change", metavar="JSON", help="without --target: args by application, of a second gateway")
    parser.add_argument("--args", metavar="JSON", default="{}", help="without --target: args by application, of all")
    parser.add_argument("--samplers-off", action="store_true", help="the same with both samplers off, beside it")
    parser.add_argument("--work", choices=("posters", "photos"), default="posters", help="posters are scored")
    parser.add_argument("--images", type=int, default=40, help="of the pool that is asked about")
    parser.add_argument(
        "--reuse", type=float, default=0.75, help="share of requests about an image that was sent before"
    )
    parser.add_argument("--sizes", type=size_hw, nargs="+", default=[(672, 672)], metavar="HxW", help="of photos")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer about a photo")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 32], help="of the closed loops")
    parser.add_argument("--requests", type=int, default=128, help="of a closed loop, 4 in flight or more")
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument("--loads", type=float, nargs="+", default=[0.5, 1, 2, 3], help="multiples of the capacity")
    rates.add_argument("--rates", type=float, nargs="+", help="requests a second")
    parser.add_argument("--arrivals", choices=("poisson", "burst"), nargs="+", default=["poisson", "burst"])
    parser.add_argument("--burst", type=int, default=16, help="requests that come at once")
    parser.add_argument("--seconds", type=float, default=15, help="of arrivals, a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ttft-ms", type=float, default=1000, help="longest time to first token that is good")
    parser.add_argument("--tpot-ms", type=float, default=100, help="longest time per token that is good")
    parser.add_argument("--timeout-s", type=float, default=120, help="of a request")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "serving.json")
    options = parser.parse_args()
    if options.change and options.target:
        parser.error("--change starts a gateway of its own, which a --target has not")
    if options.against and not options.target:
        parser.error("--against needs a --target")
    return options


def main() -> None:
    options = arguments()
    goal = Goal(ttft_s=options.ttft_ms / 1000, tpot_s=options.tpot_ms / 1000)
    work: Work
    if options.work == "posters":
        work = Posters(options.images, options.reuse)
    else:
        work = Photos(options.images, options.reuse, options.sizes, options.tokens)
    with reached(options) if options.target else started(options) as (targets, pids):
        first = targets["as it is"]
        if options.samplers_off:
            targets["samplers off"] = Target(**{**vars(first), "settings": SAMPLERS_OFF})
        checkpoint = asyncio.run(model_name(first))
        bench = Bench(targets, work, goal, options.timeout_s, pids)
        bench.warm_up()
        closed = sweep(bench, options.concurrency, options.requests)
        show(
            ("in flight", "setting"), [((str(n), name), f) for n, point in closed.items() for name, f in point.items()]
        )
        capacity = max(point["as it is"]["answered_per_s"] for point in closed.values())
        print(f"capacity {capacity:.1f} requests/s\n", flush=True)
        points = []
        loads = options.rates or [load * capacity for load in options.loads]
        for arrivals in options.arrivals:
            for rate in loads:
                burst = options.burst if arrivals == "burst" else 1
                turns = offer(bench, rate, burst, options.seconds, options.rounds)
                ratios = goodput_ratios(turns)
                points.append({"arrivals": arrivals, "rate": rate, "turns": turns, "ratios": ratios})
                said = f"{arrivals} {rate / capacity:.2g}x"
                show(("load", "setting"), [((said, name), median_of(mine)) for name, mine in turns.items()])
                for pair, (middle, least, greatest) in ratios.items():
                    print(f"goodput, {pair}: {middle:.2f}x ({least:.2f} to {greatest:.2f})")
                print(flush=True)
    content = {
        "checkpoint": checkpoint, "machine": machine(range(2)), "goal": vars(goal), "capacity": capacity,
        "asked": asked(sys.argv[1:]),
        "closed": closed, "points": points,
    }  # fmt: skip
    write_results("serving", content, options.out)


if __name__ == "__main__":
    with signals_interrupt():  # a cluster that it started is stopped then, too
        main()
