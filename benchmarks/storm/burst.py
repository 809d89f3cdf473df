"""A burst of requests at both doors at once, many times what can be answered: each ends in an answer or a refusal.

A refusal says when to come back. Afterwards nothing is held, and one more burst leaves memory where the last one did:
the first ones fill the KV cache, of which pages that were never used take no memory.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import Counter

from benchmarks.clusters import ONE_REPLICA
from benchmarks.measure import print_table
from benchmarks.questions import Posters, Work
from benchmarks.storm.doors import ANSWER, REFUSAL, Doors, Ending
from benchmarks.storm.vitals import memory_and_files, vitals, wait_until_idle
from cluster.local import LocalCluster

CAPACITY_REQUESTS = 64


async def endings(cluster: LocalCluster, work: Work, requests: int, seconds: float, seed: int) -> list[Ending]:
    """Asks every second question at the other door, within so many seconds."""
    doors = Doors(cluster)

    async def at(number: int) -> Ending:
        await asyncio.sleep(seconds * number / requests)
        return await (doors.http if number % 2 else doors.grpc)(questions[number])

    questions = work.questions(requests, seed)
    try:
        return list(await asyncio.gather(*map(at, range(requests))))
    finally:
        await doors.close()


async def capacity(cluster: LocalCluster, work: Work) -> float:
    """Requests a second with 16 in flight at both doors."""
    doors, left, began = Doors(cluster), work.questions(CAPACITY_REQUESTS, 0), time.perf_counter()

    async def one_after_the_other(number: int) -> None:
        while left:
            await (doors.http if number % 2 else doors.grpc)(left.pop())

    await asyncio.gather(*map(one_after_the_other, range(16)))
    await doors.close()
    return CAPACITY_REQUESTS / (time.perf_counter() - began)


def run(options: argparse.Namespace) -> list[str]:
    """Prints what happened; returns what should not have."""
    gateway = dict(ONE_REPLICA)
    if options.rays_places:  # so few that Ray Serve itself refuses
        gateway |= {"max_ongoing_requests": options.rays_places, "max_queued_requests": options.rays_places // 2}
    faults: list[str] = []
    with LocalCluster(
        grpc_port=0, timeout_s=400, options={"gateway": gateway, "encoder": ONE_REPLICA, "llm": ONE_REPLICA}
    ) as cluster:
        cluster.start()
        work = Posters(20, 0.75)
        asyncio.run(capacity(cluster, work))  # caches and allocators fill
        rate = asyncio.run(capacity(cluster, work))
        wait_until_idle(cluster)
        levels = [vitals(cluster)]
        for number in range(1, options.bursts + 1):
            seconds = options.requests / (options.times * rate)
            began = time.perf_counter()
            ended = asyncio.run(endings(cluster, work, options.requests, seconds, number))
            took = time.perf_counter() - began
            kinds = Counter(ending.kind for ending in ended)
            said = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
            print(f"burst {number}: {options.requests} in {seconds:.1f} s, {options.times:g} times {rate:.1f}/s; "
                  f"all ended after {took:.1f} s: {said}", flush=True)  # fmt: skip
            wrong = {ending.kind: ending.message for ending in ended if ending.kind not in (ANSWER, REFUSAL)}
            faults += [f"{kinds[kind]} of burst {number}: {kind}: {message}" for kind, message in wrong.items()]
            left = wait_until_idle(cluster)
            faults += [f"after burst {number}: {title} is {amount:g}" for title, amount in left.items()]
            levels.append(vitals(cluster))
        print_table(("level", "before", *(f"after {n}" for n in range(1, options.bursts + 1))),
                    [[title, *(f"{level.get(title, 0):.0f}" for level in levels)] for title in levels[0]])  # fmt: skip
        grown = {title: levels[-1][title] - levels[-2][title] for title in memory_and_files(cluster)}
        faults += [f"{title} grew by {by:.0f} in the last burst" for title, by in grown.items()
                   if by > options.most_growth]  # fmt: skip
    return faults


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--times", type=float, default=10, help="the capacity")
    parser.add_argument("--bursts", type=int, default=4)
    parser.add_argument("--rays-places", type=int, help="of the gateway in Ray Serve; few have Ray itself refuse")
    parser.add_argument("--most-growth", type=float, default=64, help="MiB, and files, in the last burst")
