"""Two API keys: one storms, the other asks one question at a time. What does the quiet one notice?"""

from __future__ import annotations

import argparse
import asyncio
import json
import pathlib
import tempfile
from collections import Counter

from benchmarks.clusters import ONE_REPLICA
from benchmarks.measure import percentile, print_table
from benchmarks.open_loop import Client, Outcome, Target
from benchmarks.questions import Posters
from cluster.local import LocalCluster
from services.gateway.keys import hash_of, new_key

ROOM = {"running": {"requests": 16, "tokens": 10**6, "tiles": 1280}}
"""Requests at the stages at once: beyond them turns are taken, so the storm's own latency is in the line."""


async def storm(quiet: Client, loud: Client, work: Posters, requests: int, in_flight: int) -> list[list[Outcome]]:
    """The quiet one's outcomes alone and in the storm, and the storm's."""
    alone = [await quiet.ask(question) for question in work.questions(requests, 1)]
    over = asyncio.Event()

    async def loudly(number: int) -> list[Outcome]:
        found, questions = list[Outcome](), work.questions(10_000, 100 + number)
        while not over.is_set():
            found.append(await loud.ask(questions[len(found)]))
        return found

    storming = [asyncio.create_task(loudly(number)) for number in range(in_flight)]
    await asyncio.sleep(5)
    beside = [await quiet.ask(question) for question in work.questions(requests, 1)]
    over.set()
    return [alone, beside, [outcome for task in storming for outcome in await task]]


def run(options: argparse.Namespace) -> list[str]:
    """Prints what happened; returns what should not have."""
    keys = {name: new_key() for name in ("quiet", "loud")}

    async def ask(address: str) -> list[list[Outcome]]:
        quiet, loud = (Client(Target(address=address, api_key=keys[name]), 120) for name in ("quiet", "loud"))
        try:
            return await storm(quiet, loud, Posters(20, 0.75), options.requests, options.in_flight)
        finally:
            await quiet.close()
            await loud.close()

    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "keys.json"
        file.write_text(json.dumps({"keys": [{"name": n, "sha256": hash_of(key)} for n, key in keys.items()]}))
        options_of = dict.fromkeys(("gateway", "encoder", "llm"), ONE_REPLICA)
        args = {"gateway": {"limits": ROOM}}
        with LocalCluster(grpc_port=0, timeout_s=400, api_keys=file, options=options_of, args=args) as cluster:
            cluster.start()
            found = asyncio.run(ask(cluster.grpc_address))
    names = ("quiet, alone", "quiet, in the storm", f"loud, {options.in_flight} in flight")
    rows, faults = [], []
    for name, outcomes in zip(names, found, strict=True):
        ttft = [1e3 * each.ttft_s for each in outcomes]
        codes = Counter(each.code for each in outcomes)
        said = ", ".join(f"{count} {code}" for code, count in codes.items())
        rows.append([name, f"{percentile(ttft, 0.5):.0f}", f"{percentile(ttft, 0.99):.0f}", said])
        if name.startswith("quiet") and set(codes) != {"OK"}:
            faults.append(f"{name}: {said}")
    print_table(("key", "TTFT p50, ms", "p99", "ended"), rows)
    quiet, loud = (percentile([each.ttft_s for each in found[which]], 0.5) for which in (1, 2))
    if quiet > loud / 2:
        faults.append(f"the quiet key waits {quiet:.1f} s for a first token, the storm {loud:.1f} s")
    return faults


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=20, help="of the quiet key, alone and in the storm")
    parser.add_argument("--in-flight", type=int, default=100, help="requests of the loud key")
