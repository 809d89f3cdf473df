"""What structured output costs: tokens per second of answers that follow a JSON Schema beside free ones, in one run.

    python -m benchmarks.structured CHECKPOINT --cores 0-1

Text questions alone, so that nearly all of the time is decode, where the masks are computed. Both peers run in one
process on the same engine and take turns within every round. Every answer has the same number of tokens: the schema's
last text is longer than that. The checkpoint may be random (benchmarks/random_checkpoint.py), for the model's size, or
the shipped one.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from benchmarks.device import device_name
from benchmarks.measure import (
    Progress,
    add_machine_options,
    closed_loop,
    machine,
    median_of,
    pin,
    print_table,
    ratio_of,
    summary,
    take_turns,
    write_results,
)
from services.common.types import ChatTurn, Constraint, GenerateRequest, SamplingParams, TextPart, TokenEvent
from services.compute.dtypes import choose_dtype
from services.llm.engine import Engine

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["photo", "chart", "drawing"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "colours": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 3, "maxItems": 5},
        "where": {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}}},
        "description": {"type": "string", "minLength": 1000},
    },
    "required": ["kind", "count", "colours", "where", "description"],
}


class Answers:
    """One peer: the engine with a constraint or without."""

    def __init__(self, engine: Engine, constraint: Constraint | None, new_tokens: int):
        self.engine, self.constraint, self.new_tokens = engine, constraint, new_tokens

    def add(self, request: int) -> None:
        turn = ChatTurn(role="user", parts=(TextPart(text=f"Describe picture {request}."),))
        sampling = SamplingParams(
            max_tokens=self.new_tokens, ignore_eos=True, temperature=1.0, seed=request, constraint=self.constraint
        )
        self.engine.submit(GenerateRequest(request_id=str(request), turns=(turn,), sampling=sampling))

    def step(self) -> Iterable[Progress]:
        for request_id, event in self.engine.step():
            tokens = len(event.token_ids) if isinstance(event, TokenEvent) else 0
            yield Progress(request=int(request_id), new_tokens=tokens, finished=not isinstance(event, TokenEvent))


def run(peer: Answers, requests: Sequence[int], concurrency: int) -> dict[str, float]:
    return summary(*closed_loop(peer, requests, concurrency))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("--concurrency", type=int, default=16, help="requests in flight")
    parser.add_argument("--requests", type=int, default=32, help="a turn")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before those that count")
    add_machine_options(parser)
    options = parser.parse_args()
    pin(options.cores)
    torch.set_num_threads(len(options.cores))
    engine = Engine.from_checkpoint(
        options.checkpoint,
        dtype=choose_dtype(options.dtype, options.device),
        device=options.device,
        kv_cache_bytes=2 * 2**30,
        max_running=options.concurrency,
    )
    peers = {
        "free": Answers(engine, None, options.new_tokens),
        "schema": Answers(engine, Constraint(kind="json_schema", text=json.dumps(SCHEMA)), options.new_tokens),
    }
    numbers = range(options.requests)
    results = take_turns(
        {name: lambda peer=peer: run(peer, numbers, options.concurrency) for name, peer in peers.items()},  # type: ignore[misc]
        rounds=options.rounds,
        warm_up=options.warm_up,
    )
    rate = {name: [turn["output_tokens_per_s"] for turn in turns] for name, turns in results.items()}
    middle, least, greatest = ratio_of(rate["schema"], rate["free"])
    rows: list[list[Any]] = []
    for name, turns in results.items():
        figures = median_of(turns)
        rows.append([name, *(f"{figures[key]:.1f}" for key in ("output_tokens_per_s", "tpot_p50_ms", "tpot_p99_ms"))])
    print_table(("answers", "tok/s", "TPOT p50 ms", "p99 ms"), rows)
    print(f"tokens/s schema/free: {middle:.2f}x ({least:.2f} to {greatest:.2f}), {options.concurrency} in flight")
    content = {
        "machine": machine(options.cores),
        "device": device_name(options.device),
        "vocabulary": engine.decoder.config.vocab_size,
        "concurrency": options.concurrency,
        "results": results,
        "ratio": {"median": middle, "least": least, "greatest": greatest},
    }
    write_results("structured", content, options.out or f"structured-{options.checkpoint.name}")
    engine.grammars.close()


if __name__ == "__main__":
    main()
