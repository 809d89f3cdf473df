"""kill -9 under load, again and again: of the encoder, the LLM, the gateway, Serve's proxy and Redis.

Clients with the default retry ask all the time. What they see as an error is a fault, but for an answer that had begun
when its own gateway or proxy was killed: what has been read is never sent twice.
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.measure import print_table
from benchmarks.questions import Posters, Question
from benchmarks.redis_server import RedisServer
from benchmarks.storm.doors import LEAKS
from benchmarks.storm.vitals import replicas, wait_until_idle
from cluster.local import LocalCluster
from focusllava import FocusClient, FocusClientError

OWN_CONNECTIONS = ("gateway", "proxy")
"""Parts whose loss ends answers that have begun, visibly."""
LONG_TOKENS = 200
"""Tokens of every third answer, so that kills find some in the middle."""
TIMEOUT_S = 180.0


@dataclass
class Load:
    """Clients that ask until they are told to end."""

    address: str
    questions: list[Question]
    answers: int = 0
    broken_off: Counter[str] = field(default_factory=Counter)
    """Answers that had begun, by the part that was killed last."""
    failed: Counter[str] = field(default_factory=Counter)
    """Errors of requests of which nothing had come, by part, code and message."""
    part: str = ""
    """What was killed last."""
    slowest_s: float = 0.0
    _done: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def wait_for_an_answer(self, seconds: float = 120) -> None:
        """Returns once another answer has ended."""
        before, end = self.answers, time.monotonic() + seconds
        while self.answers == before:
            if time.monotonic() > end:
                raise TimeoutError(f"no answer within {seconds:g} s of a kill of {self.part}")
            time.sleep(0.05)

    def start(self, clients: int) -> None:
        self._threads = [threading.Thread(target=self._ask_on, args=(number,)) for number in range(clients)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()

    def _ask_on(self, number: int) -> None:
        with FocusClient(self.address, timeout_s=TIMEOUT_S) as client:
            while not self._done.is_set():
                question = self.questions[number % len(self.questions)]
                number += 7
                settings = dict(question.settings)
                if number % 3 == 0:
                    settings |= {"max_tokens": LONG_TOKENS, "ignore_eos": True}
                # Another file each time: neither the cache nor Redis knows it.
                image = question.image + number.to_bytes(8) if number % 2 else question.image
                began, text = time.monotonic(), ""
                try:
                    with client.ask(image, question.text, **settings) as stream:  # type: ignore[arg-type]
                        for piece in stream:
                            text += piece
                except FocusClientError as error:
                    self._count(error, text)
                else:
                    with self._lock:
                        self.answers += 1
                        self.slowest_s = max(self.slowest_s, time.monotonic() - began)

    def _count(self, error: FocusClientError, text: str) -> None:
        told = " that tells internals" if LEAKS.search(error.message) else ""
        with self._lock:
            if text and not told:
                self.broken_off[self.part] += 1
            else:
                self.failed[f"{self.part}: {error.code}{told}: {error.message[:200]}"] += 1


def kill_replica(cluster: LocalCluster, part: str) -> None:
    """Ends a process of this part, and waits until another one has its place."""
    old = [pid for pid, role in replicas(cluster).items() if role == part]
    os.kill(old[0], signal.SIGKILL)
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if any(role == part and pid not in old for pid, role in replicas(cluster).items()):
            return
        time.sleep(0.2)
    raise TimeoutError(f"no new {part} in 120 s")


def run(options: argparse.Namespace) -> list[str]:
    """Prints what happened; returns what should not have."""
    scale = {"autoscaling_config": {"min_replicas": options.replicas, "max_replicas": options.replicas}}
    names = ("gateway", "encoder", "llm")
    with tempfile.TemporaryDirectory() as folder:
        redis = RedisServer(pathlib.Path(folder))
        args = {"gateway": {"redis_url": redis.url}}
        try:
            with LocalCluster(grpc_port=0, timeout_s=400, options=dict.fromkeys(names, scale), args=args) as cluster:
                cluster.start()
                return against(cluster, redis, options)
        finally:
            redis.kill()


def against(cluster: LocalCluster, redis: RedisServer, options: argparse.Namespace) -> list[str]:
    """Does what `run` does, to a cluster that runs and whose gateway uses this Redis."""

    def kill_redis() -> None:
        redis.kill()
        time.sleep(2)
        redis.start()

    ways: dict[str, Callable[[], None]] = {
        part: functools.partial(kill_replica, cluster, part) for part in ("encoder", "llm", "gateway", "proxy")
    }
    ways["redis"] = kill_redis
    load, rows = Load(cluster.grpc_address, Posters(20, 0.5).questions(200, 0)), list[list[object]]()
    load.start(options.clients)
    try:
        time.sleep(options.pause_s)
        for part in options.parts:
            load.part, before, load.slowest_s = part, load.answers, 0.0
            for _ in range(options.kills):
                ways[part]()
                load.wait_for_an_answer()  # a process that does not answer yet has nothing to lose
                time.sleep(options.pause_s)
            lost = sum(count for said, count in load.failed.items() if said.startswith(f"{part}:"))
            answers = load.answers - before
            rows.append([part, options.kills, answers, lost, load.broken_off[part], f"{load.slowest_s:.1f}"])
            print(f"{part}: killed {options.kills} times, {answers} answers", flush=True)
    finally:
        load.end()
    left = wait_until_idle(cluster)
    print_table(("killed", "times", "answers", "failures", "broken off", "slowest, s"), rows)
    faults = [f"{count} of {said}" for said, count in load.failed.items()]
    faults += [f"{count} answers broken off by {part}" for part, count in load.broken_off.items()
               if part not in OWN_CONNECTIONS]  # fmt: skip
    return faults + [f"at the end {title} is {amount:g}" for title, amount in left.items()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parts = ("encoder", "llm", "gateway", "proxy", "redis")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--kills", type=int, default=5, help="of each part")
    parser.add_argument("--replicas", type=int, default=1, help="of each application")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--pause-s", type=float, default=5, help="from the first answer after a kill to the next")
