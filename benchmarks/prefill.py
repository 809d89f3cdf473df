"""The LLM's prefill by itself: what pruning saves, against what arithmetic allows.

    python -m benchmarks.prefill FOLDER --cores 0-1

Arithmetic: linear layers cost in proportion to a layer's tokens, causal attention to their square. Both rates are
measured in the same run, with the engine's own linear layers and attention kernel at the full length. Allowed is the
ratio of the two times that these rates give; the share is the measured speed-up over the allowed one. The visual tokens
are random: `both` gets 49 % of 2,928 from the encoder, of which 75 % go on into layers k..L-1.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import pathlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.device import seconds_of, set_up, wait
from benchmarks.measure import (
    add_machine_options,
    median,
    print_table,
    ratio_of,
    take_turns,
    write_results,
)
from benchmarks.stages import FULL_TOKENS, PAPER_VISION_KEEP, SETTINGS, events, question, random_visual_tokens
from services.common.types import FinishedEvent, Usage
from services.llm.engine import Engine
from services.llm.kernels import choose_kernels


@dataclass(frozen=True, kw_only=True)
class LayerWork:
    """Floating-point operations of one prefill."""

    linear: float
    attention: float

    def seconds(self, linear_rate: float, attention_rate: float) -> float:
        """Time that it takes at so many operations a second."""
        return self.linear / linear_rate + self.attention / attention_rate


def prefill_work(tokens_of_layers: Iterable[int], weights: int, attention_width: int) -> LayerWork:
    """tokens_of_layers: tokens that go through each layer; weights: elements of a layer's linear weights;
    attention_width: query heads times head width."""
    tokens = list(tokens_of_layers)
    return LayerWork(
        linear=sum(2.0 * n * weights for n in tokens),
        # Two products of n x n x width, half of it masked.
        attention=sum(2.0 * n * n * attention_width for n in tokens),
    )


class Prefill:
    """One engine, and turns that time a prompt's prefill or one of the two rates."""

    def __init__(self, checkpoint: pathlib.Path, dtype: torch.dtype, device: str):
        self.engine = Engine.from_checkpoint(
            checkpoint, dtype=dtype, device=device, kv_cache_bytes=2**30, prefix_reuse=False
        )
        self.decoder = self.engine.decoder
        self.linears = [m for m in self.decoder.layers[0].modules() if hasattr(m, "out_features")]
        self.heads = self.decoder.config.num_attention_heads
        self.usage: dict[str, Usage] = {}
        self._seeds = itertools.count()

    @property
    def weights(self) -> int:
        return sum(linear.in_features * linear.out_features for linear in self.linears)  # type: ignore[misc]

    def prompt(self, name: str) -> float:
        """Seconds from a prompt's turn in the queue to its first token."""
        setting, seed = SETTINGS[name], next(self._seeds)
        count = round(PAPER_VISION_KEEP * FULL_TOKENS) if setting.vision else FULL_TOKENS
        image = random_visual_tokens(self.engine, count, seed)
        sequence = self.engine.prepare(question(f"{name}-{seed}", image, setting, 1))
        wait(self.decoder.device)
        began = time.perf_counter()
        for event in events(self.engine, sequence):
            if isinstance(event, FinishedEvent):
                self.usage[name] = event.usage
        wait(self.decoder.device)
        return time.perf_counter() - began

    @torch.inference_mode()
    def linear_rate(self, tokens: int) -> float:
        """Operations a second of one layer's linear layers."""
        inputs = [
            torch.randn(tokens, m.in_features, device=self.decoder.device).to(self.decoder.dtype)  # type: ignore[call-overload]
            for m in self.linears
        ]

        def layer() -> None:
            for linear, x_MK in zip(self.linears, inputs, strict=True):
                linear(x_MK)

        return 2.0 * tokens * self.weights / seconds_of(layer, self.decoder.device)

    @torch.inference_mode()
    def attention_rate(self, tokens: int) -> float:
        """Operations a second of causal attention, the masked half not counted."""
        width = self.decoder.head_dim
        kernels = choose_kernels(self.decoder.device, self.decoder.dtype)
        query, key, value = (
            torch.randn(tokens, heads, width, device=self.decoder.device).to(self.decoder.dtype)
            for heads in (self.heads, self.decoder.kv_heads, self.decoder.kv_heads)
        )
        attend = functools.partial(kernels.prefill, query, key, value, [tokens], [tokens], width**-0.5)
        return 2.0 * tokens * tokens * self.heads * width / seconds_of(attend, self.decoder.device)

    def work(self, name: str) -> LayerWork:
        usage, k = self.usage[name], self.engine.prune_layer
        above = usage.prompt_tokens - usage.visual_tokens_sampled + usage.visual_tokens_kept
        layers = [usage.prompt_tokens] * k + [above] * (self.decoder.num_layers - k)
        return prefill_work(layers, self.weights, self.heads * self.decoder.head_dim)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="holds `focusllava`")
    parser.add_argument("--rounds", type=int, default=20)
    add_machine_options(parser)
    options = parser.parse_args()
    dtype, described = set_up(options)
    bench = Prefill(options.folder / "focusllava", dtype, options.device)
    turns: dict[str, Any] = {name: functools.partial(bench.prompt, name) for name in SETTINGS}
    turns["linear"] = functools.partial(bench.linear_rate, FULL_TOKENS)
    turns["attention"] = functools.partial(bench.attention_rate, FULL_TOKENS)
    results = take_turns(turns, options.rounds, warm_up=2)

    linear, attention = median(results["linear"]), median(results["attention"])
    off = bench.work("off").seconds(linear, attention)
    rows, settings = [], {}
    for name in SETTINGS:
        usage, work = bench.usage[name], bench.work(name)
        speedup, least, greatest = ratio_of(results["off"], results[name])
        allowed = off / work.seconds(linear, attention)
        settings[name] = {
            "seconds": median(results[name]),
            "speedup": speedup,
            "speedup_least": least,
            "speedup_greatest": greatest,
            "allowed_speedup": allowed,
            "share_of_allowed": speedup / allowed,
            "arithmetic_seconds": work.seconds(linear, attention),
            "prompt_tokens": usage.prompt_tokens,
            "visual_tokens_sampled": usage.visual_tokens_sampled,
            "visual_tokens_kept": usage.visual_tokens_kept,
            "converted_share": usage.converted_share,
            "kv_bytes": usage.kv_bytes,
            "kv_share_of_off": usage.kv_bytes / bench.usage["off"].kv_bytes,
        }
        tokens = f"{usage.visual_tokens_sampled} > {usage.visual_tokens_kept}"
        rows.append([
            name, tokens, f"{1e3 * settings[name]['seconds']:.1f}", f"{1e3 * settings[name]['arithmetic_seconds']:.1f}",
            f"{speedup:.2f}", f"{allowed:.2f}", f"{speedup / allowed:.0%}", f"{settings[name]['kv_share_of_off']:.3f}",
        ])  # fmt: skip
    print(
        f"linear layers {linear / 1e9:.0f} GFLOP/s, attention {attention / 1e9:.0f} GFLOP/s at {FULL_TOKENS} tokens\n"
    )
    header = ("samplers", "visual tokens", "ms", "arithmetic ms", "speed-up", "allowed", "share", "KV / off")
    print_table(header, rows)
    content = {
        **described,
        "linear_flops_per_s": linear,
        "attention_flops_per_s": attention,
        "settings": settings,
        "turns": results,
    }
    write_results("prefill", content, options.out or f"prefill-{options.folder.name}")


if __name__ == "__main__":
    main()
