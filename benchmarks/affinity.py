"""Conversations on two language model replicas: each turn to the one that has its beginning, or to the freer one.

One cluster has two gateways before the same two replicas, which take turns: `owner` with `affinity` as it is shipped,
`freest` without. Several conversations of some turns each run at a time, about an image that nobody has asked about
before; each turn repeats what was said. Prompt tokens that a replica found in its cache are its own count.

    python -m benchmarks.affinity checkpoints/focusllava-tiny
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import pathlib
import re
import tempfile
import time
import urllib.request
from typing import Any

import grpc.aio
import yaml

from benchmarks.measure import RESULTS, ROOT, machine, median, percentile, take_turns, write_results
from benchmarks.replica_tables import affinity
from cluster.local import SERVE_CONFIG, LocalCluster
from focusllava.v1 import focus_pb2, focus_pb2_grpc, llm_pb2

GATEWAYS = {"owner": "gateway", "freest": "gateway-freest"}
"""Peers, and the applications that answer for them."""
QUESTIONS = ("What number is on the red card?", "And on the blue one?", "Which is larger?", "What else is there?")
REUSED = re.compile(r"^ray_focusllava_prompt_tokens_reused\{[^\n]*\} (\S+)$", re.MULTILINE)
SETTLE_S = 12
"""Seconds after which every replica's counts have reached the metrics' page."""


def two_gateways() -> dict[str, Any]:
    """The shipped Serve configuration with a second gateway, which knows no owners."""
    config = yaml.safe_load(SERVE_CONFIG.read_text("utf8"))
    (first,) = (application for application in config["applications"] if application["name"] == "gateway")
    args = {**first["args"], "network": "loopback", "llm": {"application": "llm", "affinity": None}}
    second = {**first, "name": GATEWAYS["freest"], "route_prefix": "/freest", "args": args}
    return {**config, "applications": [*config["applications"], second]}


class Conversations:
    """Has conversations over the public gRPC API, some at a time."""

    def __init__(self, cluster: LocalCluster, image: bytes, *, turns: int, tokens: int):
        self._cluster, self._image, self._turns, self._tokens = cluster, image, turns, tokens
        self._fresh = itertools.count()
        self._runner = asyncio.Runner()
        self._channel: grpc.aio.Channel | None = None

    def turn(self, application: str, conversations: int, concurrency: int) -> dict[str, float]:
        """Has all of them; times to first token are in milliseconds."""
        before = self._reused()
        told = self._runner.run(self._have(application, conversations, concurrency))
        time.sleep(SETTLE_S)
        first, later = ([t for t in told if (t["turn"] == 0) == is_first] for is_first in (True, False))
        follow_up_tokens = sum(t["prompt_tokens"] for t in later)
        return {
            "first_turn_ttft_p50_ms": median(t["ttft_ms"] for t in first),
            "follow_up_ttft_p50_ms": median(t["ttft_ms"] for t in later),
            "follow_up_ttft_p95_ms": percentile((t["ttft_ms"] for t in later), 0.95),
            "follow_up_prompt_tokens": follow_up_tokens / len(later),
            "prompt_tokens_reused": (self._reused() - before) / len(later),
            "seconds": max(t["end"] for t in told) - min(t["begin"] for t in told),
        }

    def _reused(self) -> float:
        with urllib.request.urlopen(self._cluster.metrics_url, timeout=30) as page:
            return sum(map(float, REUSED.findall(page.read().decode())))

    async def _have(self, application: str, conversations: int, concurrency: int) -> list[dict[str, float]]:
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._cluster.grpc_address)
        stub = focus_pb2_grpc.FocusServiceStub(self._channel)  # type: ignore[no-untyped-call]
        # Readers ignore bytes after a picture's end: the same picture, under a hash that nobody has seen.
        images = iter([self._image + next(self._fresh).to_bytes(4, "big") for _ in range(conversations)])
        told: list[dict[str, float]] = []

        async def one_after_the_other() -> None:
            for image in images:
                questions = itertools.cycle(QUESTIONS)
                said = [turn(llm_pb2.ROLE_USER, next(questions), image)]
                for number in range(self._turns):
                    answer, facts = await self._ask(stub, application, said)
                    told.append({"turn": number, **facts})
                    said += [turn(llm_pb2.ROLE_ASSISTANT, answer), turn(llm_pb2.ROLE_USER, next(questions))]

        await asyncio.gather(*(one_after_the_other() for _ in range(concurrency)))
        return told

    async def _ask(self, stub: Any, application: str, turns: list[focus_pb2.ChatTurn]) -> tuple[str, dict[str, float]]:
        sampling = llm_pb2.SamplingParams(max_tokens=self._tokens, ignore_eos=True)
        request = focus_pb2.ChatRequest(turns=turns, sampling=sampling)
        begin, first, text, usage = time.perf_counter(), 0.0, "", llm_pb2.Usage()
        async for event in stub.Chat(request, metadata=(("application", application),), timeout=300):
            text += event.token.text
            if event.token.token_ids and not first:
                first = time.perf_counter()
            usage = event.finished.usage if event.HasField("finished") else usage
        assert usage.completion_tokens == self._tokens, f"{usage.completion_tokens} of {self._tokens} tokens came"
        facts = {"ttft_ms": 1e3 * (first - begin), "prompt_tokens": usage.prompt_tokens}
        return text, {**facts, "begin": begin, "end": time.perf_counter()}


def turn(role: int, words: str, image: bytes | None = None) -> focus_pb2.ChatTurn:
    parts = [focus_pb2.ChatPart(image=image)] if image else []
    return focus_pb2.ChatTurn(role=role, parts=[*parts, focus_pb2.ChatPart(text=words or " ")])  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("--image", type=pathlib.Path, default=ROOT / "docs" / "assets" / "sample.png")
    parser.add_argument("--conversations", type=int, default=24, help="of one round")
    parser.add_argument("--concurrency", type=int, default=4, help="conversations at a time")
    parser.add_argument("--turns", type=int, default=5, help="of a conversation")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kv-cache-bytes", type=int, default=256 * 2**20, help="of each replica")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "affinity.json")
    options = parser.parse_args()

    two = {"autoscaling_config": {"min_replicas": 2, "max_replicas": 2}}
    one = {"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}}
    with tempfile.TemporaryDirectory() as folder:
        config = pathlib.Path(folder) / "serve.yaml"
        config.write_text(yaml.safe_dump(two_gateways()), "utf8")
        with LocalCluster(
            checkpoint=options.checkpoint, grpc_port=0, timeout_s=400, config=config,
            args={"llm": {"kv_cache_bytes": options.kv_cache_bytes}},
            options={"llm": two, **{name: one for name in ("encoder", *GATEWAYS.values())}},
        ) as cluster:  # fmt: skip
            cluster.start(lambda line: print(f"bench: {line}", flush=True))
            asked = Conversations(cluster, options.image.read_bytes(), turns=options.turns, tokens=options.tokens)
            turns = take_turns(
                {
                    name: functools.partial(asked.turn, application, options.conversations, options.concurrency)
                    for name, application in GATEWAYS.items()
                },
                options.rounds,
            )
    print(affinity(turns))
    content = {
        "checkpoint": options.checkpoint.name, "machine": machine(range(2)), "turns": turns,
        "conversations": options.conversations, "in_flight": options.concurrency, "turns_each": options.turns,
        "tokens": options.tokens,
    }  # fmt: skip
    write_results("affinity", content, options.out)


if __name__ == "__main__":
    main()
