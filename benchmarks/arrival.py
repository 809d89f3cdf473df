"""How long running answers stand still while a long prompt arrives, under several token budgets a step and under none.

    python -m benchmarks.arrival FOLDER --cores 0-1

Some short questions decode; then a prompt of 2,928 visual tokens is submitted. Measured are the longest gap between two
tokens of a running answer from then on, the ordinary gap before, and what the arriving prompt pays: its time to first
token.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import pathlib
import time
from typing import Any

import torch

from benchmarks.device import set_up
from benchmarks.measure import (
    add_machine_options,
    median,
    median_of,
    percentile,
    print_table,
    take_turns,
    write_results,
)
from benchmarks.stages import FULL_TOKENS, SETTINGS, question, random_visual_tokens
from benchmarks.workload import QUESTION
from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.store import fingerprint
from services.common.types import GenerateRequest, PromptTurn, SamplingParams, TextPart, TokenEvent
from services.llm.engine import Engine
from services.llm.engine_config import EngineConfig
from services.llm.model import Decoder
from services.text.prompt import PromptRenderer

NO_BUDGET = 10**9
BEFORE = 16
"""Tokens of each running answer before the prompt arrives, and after its first token."""


class Arrival:
    """One engine a budget, all on the same weights."""

    def __init__(self, checkpoint: pathlib.Path, budgets: list[int], running: int, dtype: torch.dtype, device: str):
        config = FocusLlavaConfig.load(checkpoint)
        decoder = Decoder.from_checkpoint(checkpoint, dtype=dtype, device=device)
        renderer = PromptRenderer.from_checkpoint(
            checkpoint, image_token_id=config.image_token_id, context=decoder.context
        )
        self.running = running
        self.engines = {
            budget: Engine(
                decoder, renderer, config, fingerprint(checkpoint),
                EngineConfig(kv_cache_bytes=2**29, max_batch_tokens=budget, max_running=64, prefix_reuse=False),
            )
            for budget in budgets
        }  # fmt: skip
        self._seeds = itertools.count()

    def turn(self, budget: int, setting: str) -> dict[str, float]:
        """All in milliseconds."""
        engine, seed = self.engines[budget], next(self._seeds)
        streams = [f"stream-{seed}-{index}" for index in range(self.running)]
        times: dict[str, list[float]] = {name: [] for name in (*streams, "arrival")}
        for name in streams:
            turns = (PromptTurn(role="user", parts=(TextPart(text=QUESTION),)),)
            # Ended by abort, after the arrival's first tokens.
            sampling = SamplingParams(max_tokens=4096, ignore_eos=True)
            engine.submit(GenerateRequest(request_id=name, turns=turns, sampling=sampling))
        self._step_until(engine, times, lambda: min(len(times[name]) for name in streams) >= BEFORE)
        image = random_visual_tokens(engine, FULL_TOKENS, seed)
        # The whole prompt, or the prompt of `both` without its first sampler: what arrives is 2,928 visual tokens.
        sequence = engine.prepare(question("arrival", image, SETTINGS[setting], BEFORE))
        arrived = time.perf_counter()
        engine.enqueue(sequence)
        self._step_until(engine, times, lambda: len(times["arrival"]) >= BEFORE)
        for name in streams:
            engine.abort(name)
        return {
            "usual_gap_ms": 1e3 * median(_gaps(times, streams, -math.inf, arrived)),
            "longest_gap_ms": 1e3 * max(_gaps(times, streams, arrived, math.inf)),
            "p50_gap_ms": 1e3 * percentile(_gaps(times, streams, arrived, times["arrival"][0]), 0.5),
            "ttft_ms": 1e3 * (times["arrival"][0] - arrived),
        }

    def _step_until(self, engine: Engine, times: dict[str, list[float]], done: Any) -> None:
        while not done():
            for request_id, event in engine.step():
                if isinstance(event, TokenEvent):
                    times[request_id] += [time.perf_counter()] * len(event.token_ids)


def _gaps(times: dict[str, list[float]], streams: list[str], after: float, until: float) -> list[float]:
    """Waits between two tokens of a stream, of which the later came after `after` and not after `until`."""
    return [
        later - earlier
        for name in streams
        for earlier, later in zip(times[name], times[name][1:], strict=False)
        if after < later <= until
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="holds `focusllava`")
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 512, 1024, 2048], help="tokens a step")
    parser.add_argument("--running", type=int, default=4, help="answers that decode when the prompt arrives")
    parser.add_argument("--setting", choices=("off", "text"), default="off", help="of the arriving prompt")
    parser.add_argument("--rounds", type=int, default=10)
    add_machine_options(parser)
    options = parser.parse_args()
    dtype, described = set_up(options)
    budgets = [*options.budgets, NO_BUDGET]
    bench = Arrival(options.folder / "focusllava", budgets, options.running, dtype, options.device)
    names = {str(b) if b < NO_BUDGET else "none": functools.partial(bench.turn, b, options.setting) for b in budgets}
    results = take_turns(names, options.rounds)
    medians = {name: median_of(turns) for name, turns in results.items()}
    print(f"{options.running} answers running, a prompt of {FULL_TOKENS} visual tokens arrives ({options.setting})\n")
    columns = ("usual_gap_ms", "longest_gap_ms", "p50_gap_ms", "ttft_ms")
    header = ("budget, tokens", "usual gap ms", "longest gap ms", "p50 gap in prefill", "its TTFT ms")
    print_table(header, [[name, *(f"{middle[c]:.1f}" for c in columns)] for name, middle in medians.items()])
    content = {
        **described,
        "running": options.running,
        "setting": options.setting,
        "budgets": medians,
        "turns": results,
    }
    write_results("arrival", content, options.out or f"arrival-{options.folder.name}")


if __name__ == "__main__":
    main()
