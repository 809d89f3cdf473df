"""What serving costs beside the engine: the same answers through gateway and stages, and from the engine in process.

A cluster as `make serve` starts it, one replica of each stage, and the two stages in this process on as many threads
take turns. The image is in the cache, so what is measured is the way of tokens: answers a second with many in flight,
processor time of every process by the token, and the time to first token of one request at a time.

    python -m benchmarks.served checkpoints/focusllava-tiny
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import grpc.aio
import torch

from benchmarks.clusters import ONE_REPLICA
from benchmarks.measure import (
    RESULTS,
    ROOT,
    Timeline,
    closed_loop,
    machine,
    median,
    print_table,
    ratio_of,
    summary,
    take_turns,
    write_results,
)
from benchmarks.processors import processor_seconds, spent
from benchmarks.stages import Streams
from cluster.local import LocalCluster
from focusllava import user
from focusllava.v1 import focus_pb2, focus_pb2_grpc, llm_pb2
from services.local.model import LocalModel

METADATA = (("application", "gateway"),)
WIRE = ("gateway", "proxy", "llm", "encoder")
"""Parts whose processor time is the price of serving: everything of Ray Serve's but the models' own threads."""


class Served:
    """Asks a cluster over the public gRPC API, some requests at a time."""

    def __init__(self, cluster: LocalCluster, image: bytes, question: str):
        self._cluster, self._image, self._question = cluster, image, question
        self._runner = asyncio.Runner()
        self._channel: grpc.aio.Channel | None = None

    def turn(self, requests: Sequence[int], concurrency: int, tokens: int) -> dict[str, Any]:
        """Answers all of them; processor time of each part is in seconds."""
        return self._runner.run(self._turn(requests, concurrency, tokens))

    async def _turn(self, requests: Sequence[int], concurrency: int, tokens: int) -> dict[str, Any]:
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._cluster.grpc_address)
        ask = focus_pb2_grpc.FocusServiceStub(self._channel).Chat  # type: ignore[no-untyped-call]
        request = self._request(tokens)
        queue, timelines, messages = list(reversed(requests)), [], 0

        async def one_after_the_other() -> None:
            nonlocal messages
            while queue:
                number, added, times = queue.pop(), time.perf_counter(), []
                async for event in ask(request, metadata=METADATA, timeout=300):
                    messages += 1
                    times += [time.perf_counter()] * len(event.token.token_ids)
                assert len(times) == tokens, f"{len(times)} of {tokens} tokens came"
                timelines.append(Timeline(request=number, added=added, token_times=tuple(times)))

        pids = self._cluster.state.pids()
        before, began = processor_seconds(pids), time.perf_counter()
        await asyncio.gather(*(one_after_the_other() for _ in range(concurrency)))
        seconds = time.perf_counter() - began
        used = spent(before, processor_seconds(pids))
        return {**summary(seconds, timelines), "messages": messages, "processor_s": used}

    def _request(self, tokens: int) -> focus_pb2.ChatRequest:
        parts = [focus_pb2.ChatPart(image=self._image), focus_pb2.ChatPart(text=self._question)]
        sampling = llm_pb2.SamplingParams(max_tokens=tokens, ignore_eos=True)
        return focus_pb2.ChatRequest(turns=[focus_pb2.ChatTurn(role=llm_pb2.ROLE_USER, parts=parts)], sampling=sampling)


class InProcess:
    """Asks the two stages in this process."""

    def __init__(self, model: LocalModel, image: bytes, question: str):
        self._model, self._image, self._question = model, image, question

    def turn(self, requests: Sequence[int], concurrency: int, tokens: int) -> dict[str, Any]:
        def ask(_: int) -> Any:
            return self._model.stream([user(self._question, images=self._image)], max_tokens=tokens, ignore_eos=True)

        return summary(*closed_loop(Streams(self._model, ask), requests, concurrency))


def show(turns: dict[str, list[dict[str, Any]]], tokens: int, requests: int, idle: dict[str, list[Any]]) -> None:
    print_table(
        ("peer", "tokens/s", "TTFT p50, ms", "TPOT p50, ms"),
        [
            [name, *(f"{median(turn[key] for turn in mine):.1f}"
                     for key in ("output_tokens_per_s", "ttft_p50_ms", "tpot_p50_ms"))]
            for name, mine in turns.items()
        ],
    )  # fmt: skip
    served = turns["served"]
    print("\nprocessor time, ms a token: ", end="")
    print(", ".join(
        f"{part} {median(1e3 * turn['processor_s'][part] / (tokens * requests) for turn in served):.3f}"
        for part in served[0]["processor_s"]
    ))  # fmt: skip
    print(f"tokens a message {median(tokens * requests / turn['messages'] for turn in served):.1f}")
    for name, mine in idle.items():
        print(f"one at a time, {name}: TTFT p50 {median(turn['ttft_p50_ms'] for turn in mine):.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("--image", type=pathlib.Path, default=ROOT / "docs" / "assets" / "sample.png")
    parser.add_argument("--question", default="What number is on the red card?")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer, 2 or more")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64, help="of one turn")
    parser.add_argument("--idle-requests", type=int, default=30, help="of one turn, asked one after the other")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "served.json")
    options = parser.parse_args()

    torch.set_num_threads(1)  # as a replica of the shipped configuration
    image, tokens = options.image.read_bytes(), options.tokens
    model = LocalModel(options.checkpoint, "cpu", kv_cache_bytes=256 * 2**20)
    args = {"encoder": {}, "llm": {"kv_cache_bytes": 256 * 2**20}}
    with LocalCluster(
        checkpoint=options.checkpoint, grpc_port=0, timeout_s=400, args=args,
        options={stage: ONE_REPLICA for stage in ("gateway", "encoder", "llm")},
    ) as cluster:  # fmt: skip
        cluster.start(lambda line: print(f"bench: {line}", flush=True))
        peers: dict[str, InProcess | Served] = {
            "engine": InProcess(model, image, options.question), "served": Served(cluster, image, options.question)
        }  # fmt: skip
        several = {
            name: functools.partial(peer.turn, range(options.requests), options.concurrency, tokens)
            for name, peer in peers.items()
        }
        one = {name: functools.partial(peer.turn, range(options.idle_requests), 1, 2) for name, peer in peers.items()}
        turns = take_turns(several, options.rounds)
        idle = take_turns(one, options.rounds)
    rates = {name: [turn["output_tokens_per_s"] for turn in mine] for name, mine in turns.items()}
    ratio = dict(zip(("median", "least", "greatest"), ratio_of(rates["served"], rates["engine"]), strict=True))
    show(turns, tokens, options.requests, idle)
    print(f"served / engine {ratio['median']:.2f}x ({ratio['least']:.2f} to {ratio['greatest']:.2f})")
    content = {
        "checkpoint": options.checkpoint.name, "machine": machine(range(2)), "tokens": tokens,
        "requests": options.requests, "in_flight": options.concurrency, "turns": turns, "idle": idle, "ratio": ratio,
    }  # fmt: skip
    write_results("served", content, options.out)


if __name__ == "__main__":
    main()
