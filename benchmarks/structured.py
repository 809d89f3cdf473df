"""What structured output costs: tokens per second of answers that follow a JSON Schema beside free ones, in one run.

    python -m benchmarks.structured CHECKPOINT --cores 0-1

Text questions alone, so that nearly all of the time is decode, where the masks are computed. Both peers run in one
process on the same engine and take turns within every round. Every answer has the same number of tokens: the schema's
last text is longer than that. The checkpoint may be random (benchmarks/random_checkpoint.py), for the model's size, or
the shipped one.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks.device import set_up
from benchmarks.measure import (
    add_machine_options,
    closed_loop,
    median_of,
    print_table,
    ratio_of,
    summary,
    take_turns,
    write_results,
)
from benchmarks.stages import Streams
from focusllava import user
from services.local.model import LocalModel
from services.local.stream import LocalStream

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


def describe(model: LocalModel, schema: dict[str, Any] | None, new_tokens: int, request: int) -> LocalStream:
    """An answer of exactly so many tokens, drawn with the request's number as its seed."""
    return model.stream(
        [user(f"Describe picture {request}.")],
        max_tokens=new_tokens,
        ignore_eos=True,
        temperature=1.0,
        seed=request,
        json_schema=schema,
    )


def run(peer: Streams, requests: Sequence[int], concurrency: int) -> dict[str, float]:
    return summary(*closed_loop(peer, requests, concurrency))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="of a checkpoint")
    parser.add_argument("--concurrency", type=int, default=16, help="requests in flight")
    parser.add_argument("--requests", type=int, default=32, help="a turn")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before those that count")
    add_machine_options(parser)
    options = parser.parse_args()
    _, described = set_up(options)
    model = LocalModel(
        options.folder,
        options.device,
        options.dtype,
        kv_cache_bytes=2 * 2**30,
        max_batch_tokens=8192,
        max_running=options.concurrency,
    )
    peers = {
        name: Streams(model, functools.partial(describe, model, schema, options.new_tokens))
        for name, schema in (("free", None), ("schema", SCHEMA))
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
        **described,
        "vocabulary": model.engine.decoder.config.vocab_size,
        "concurrency": options.concurrency,
        "results": results,
        "ratio": {"median": middle, "least": least, "greatest": greatest},
    }
    write_results("structured", content, options.out or f"structured-{options.folder.name}")
    model.close()


if __name__ == "__main__":
    main()
