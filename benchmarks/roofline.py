"""How near prefill and decode come to what the machine can do at all.

    python -m benchmarks.roofline FOLDER --cores 0-1

Prefill is bound by arithmetic: the rate of the decoder's linear layers at several prompt lengths, as a share of the
fastest large matrix product measured in the same run, and the attention kernel's beside it. Decode is bound by memory:
the bytes that a step must read (every weight once, each sequence's K and V once) over its time, as a share of the
bandwidth of reading a large tensor. A small model's weights stay in the processor's cache from step to step, so its
share may exceed one.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.device import seconds_of, set_up
from benchmarks.measure import add_machine_options, median, print_table, take_turns, write_results
from benchmarks.prefill import Prefill
from benchmarks.stages import FULL_TOKENS, SETTINGS, question, random_visual_tokens
from services.llm.engine import Engine

PEAK_SIDE = 4096
READ_BYTES = 512 * 2**20
PROMPT_TOKENS = (16, 512, 1435, FULL_TOKENS)


class Machine:
    """What the device itself reaches."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self._device = device
        self._square = torch.randn(PEAK_SIDE, PEAK_SIDE, device=device).to(dtype)
        self._large = torch.ones(READ_BYTES // 4, device=device)

    def matmul_rate(self) -> float:
        """Operations a second of a square matrix product."""
        return 2.0 * PEAK_SIDE**3 / seconds_of(lambda: torch.mm(self._square, self._square), self._device)

    def read_rate(self) -> float:
        """Bytes a second of a sum over memory that is in no cache."""
        return READ_BYTES / seconds_of(self._large.sum, self._device)


def weight_bytes(engine: Engine) -> int:
    """Bytes of the linear layers' weights, the head's included: what each decode step reads."""
    linears = (module for module in engine.decoder.lm.modules() if hasattr(module, "out_features"))
    return sum(m.in_features * m.out_features for m in linears) * engine.decoder.dtype.itemsize  # type: ignore[misc]


def decode_steps(engine: Engine, sequences: int, steps: int) -> tuple[list[float], int]:
    """Seconds of each of `steps` decode steps of `sequences` running requests, and the bytes that one reads."""
    held = 0
    for index in range(sequences):
        image = random_visual_tokens(engine, FULL_TOKENS, index)
        sequence = engine.prepare(question(f"decode-{index}", image, SETTINGS["off"], 512))
        held += sequence.prompt_len
        engine.enqueue(sequence)
    started: set[str] = set()
    while len(started) < sequences:
        started |= {request_id for request_id, _ in engine.step()}
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - began)
    for index in range(sequences):
        engine.abort(f"decode-{index}")
    return seconds, weight_bytes(engine) + held * engine.decoder.num_layers * engine.cache.bytes_per_token_layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="holds `focusllava`")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4, 16], help="running together")
    parser.add_argument("--steps", type=int, default=100, help="decode steps that are timed")
    add_machine_options(parser)
    options = parser.parse_args()
    dtype, described = set_up(options)
    bench = Prefill(options.folder / "focusllava", dtype, options.device)
    device = Machine(bench.decoder.device, bench.decoder.dtype)

    turns: dict[str, Callable[[], Any]] = {"matmul": device.matmul_rate, "read": device.read_rate}
    for tokens in PROMPT_TOKENS:
        turns[f"linear {tokens}"] = functools.partial(bench.linear_rate, tokens)
        turns[f"attention {tokens}"] = functools.partial(bench.attention_rate, tokens)
    results = take_turns(turns, options.rounds, warm_up=2)
    cache, layers = bench.engine.cache, bench.decoder.num_layers
    token_bytes = layers * cache.bytes_per_token_layer + bench.decoder.config.hidden_size * bench.decoder.dtype.itemsize
    engine = Engine.from_checkpoint(
        options.folder / "focusllava",
        dtype=bench.decoder.dtype,
        device=options.device,
        kv_cache_bytes=int(1.1 * max(options.sequences) * (FULL_TOKENS + 600) * token_bytes),
        prefix_reuse=False,
    )

    peak, read = max(results["matmul"]), max(results["read"])
    print(f"peak: matrix product {peak / 1e9:.0f} GFLOP/s, reading {read / 1e9:.1f} GB/s\n")
    prefill = {}
    for tokens in PROMPT_TOKENS:
        linear, attention = median(results[f"linear {tokens}"]), median(results[f"attention {tokens}"])
        prefill[tokens] = {
            "linear_flops_per_s": linear,
            "linear_share_of_peak": linear / peak,
            "attention_flops_per_s": attention,
            "attention_share_of_peak": attention / peak,
        }
    print_table(
        ("prompt tokens", "linear GFLOP/s", "of peak", "attention GFLOP/s", "of peak"),
        [
            (n, f"{r['linear_flops_per_s'] / 1e9:.0f}", f"{r['linear_share_of_peak']:.0%}",
             f"{r['attention_flops_per_s'] / 1e9:.0f}", f"{r['attention_share_of_peak']:.0%}")
            for n, r in prefill.items()
        ],
    )  # fmt: skip
    decode = {}
    for count in options.sequences:
        every, moved = decode_steps(engine, count, options.steps)
        results[f"decode {count}"] = every
        seconds = median(every)
        decode[count] = {
            "seconds_per_step": seconds,
            "bytes_per_step": moved,
            "bytes_per_s": moved / seconds,
            "share_of_read_rate": moved / seconds / read,
        }
    print()
    print_table(
        ("sequences", "ms a step", "MiB a step", "GB/s", "of reading"),
        [
            (n, f"{1e3 * r['seconds_per_step']:.2f}", f"{r['bytes_per_step'] / 2**20:.0f}",
             f"{r['bytes_per_s'] / 1e9:.1f}", f"{r['share_of_read_rate']:.0%}")
            for n, r in decode.items()
        ],
    )  # fmt: skip
    content = {
        **described,
        "peak_flops_per_s": peak,
        "read_bytes_per_s": read,
        "prefill": prefill,
        "decode": decode,
        "turns": results,
    }
    write_results("roofline", content, options.out or f"roofline-{options.folder.name}")


if __name__ == "__main__":
    main()
