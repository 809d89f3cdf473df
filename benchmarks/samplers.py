"""What each sampler costs, as a share of the LLM's prefill of the same image with samplers off.

    python -m benchmarks.samplers FOLDER --cores 0-1

Each is timed where it runs: the vision-guided sampler inside the encoder (the layout of the tokens with the sampler
less the layout without), the text-guided one inside the engine's step (Eq. 6-9: hidden states gathered, instruction
queries, visual keys, scores, selection). The LLM gets as many random visual tokens as the setting says, the encoder
real pictures.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.device import set_up, wait
from benchmarks.measure import add_machine_options, median, print_table, take_turns, write_results
from benchmarks.prefill import Prefill
from benchmarks.workload import jpeg
from services.encoder.pipeline import EncoderPipeline

TEXT_SETTINGS = ("text", "both")


class Selection:
    """The engine's own selection, with a clock around it."""

    def __init__(self, bench: Prefill):
        self.bench = bench
        self.seconds = 0.0
        self._decide = bench.engine.runner._decide
        bench.engine.runner._decide = self._timed  # type: ignore[assignment, method-assign]

    def _timed(self, *arguments: Any) -> Any:
        device = self.bench.decoder.device
        wait(device)
        began = time.perf_counter()
        decision = self._decide(*arguments)
        wait(device)
        self.seconds += time.perf_counter() - began
        return decision

    def turn(self, setting: str) -> tuple[float, float]:
        """Seconds of a whole prefill, and of the selection in it."""
        self.seconds = 0.0
        return self.bench.prompt(setting), self.seconds


class Layout:
    """The encoder's last part: the feature map of an image to its visual tokens."""

    def __init__(self, checkpoint: pathlib.Path, dtype: torch.dtype, device: str):
        self.encoder, self.device = EncoderPipeline.from_checkpoint(checkpoint, dtype=dtype, device=device), device
        self._pictures = itertools.count(2000)

    @torch.inference_mode()
    def turn(self) -> dict[str, float]:
        """Seconds of tower and projector, and of the tokens' layout with and without the sampler."""
        tiles = self.encoder.prepare(jpeg(next(self._pictures))).tiles
        model = self.encoder.model
        seconds = {}
        began = time.perf_counter()
        (feature_map,) = model.project([tiles])
        wait(self.device)
        seconds["project"] = time.perf_counter() - began
        for name, sampled in (("with", True), ("without", False)):
            began = time.perf_counter()
            model.tokens(feature_map, sampled)
            wait(self.device)
            seconds[name] = time.perf_counter() - began
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="holds `focusllava`")
    parser.add_argument("--rounds", type=int, default=20)
    add_machine_options(parser)
    options = parser.parse_args()
    dtype, described = set_up(options)
    layout = Layout(options.folder / "focusllava", dtype, options.device)
    if not layout.encoder.config.vision_sampler.enabled:
        parser.error(f"the vision-guided sampler of {options.folder} is off; see benchmarks/random_checkpoint.py")
    bench = Prefill(options.folder / "focusllava", dtype, options.device)
    selection = Selection(bench)
    turns: dict[str, Callable[[], Any]] = {
        "off": functools.partial(bench.prompt, "off"),
        "encoder": layout.turn,
        **{setting: functools.partial(selection.turn, setting) for setting in TEXT_SETTINGS},
    }
    results = take_turns(turns, options.rounds, warm_up=2)

    off = median(results["off"])
    vision = median(turn["with"] - turn["without"] for turn in results["encoder"])
    costs = {"vision-guided": {"seconds": vision, "share_of_prefill_off": vision / off}}
    costs["vision-guided"]["share_of_encoding"] = vision / median(t["project"] + t["with"] for t in results["encoder"])
    for setting in TEXT_SETTINGS:
        seconds = median(inside for _, inside in results[setting])
        own = median(inside / whole for whole, inside in results[setting])
        costs[f"text-guided, setting {setting}"] = {
            "seconds": seconds,
            "share_of_prefill_off": seconds / off,
            "share_of_own_prefill": own,
        }
    print(f"prefill with samplers off: {1e3 * off:.1f} ms\n")
    print_table(
        ("sampler", "ms", "of prefill, off", "of its own prefill"),
        [
            (name, f"{1e3 * c['seconds']:.2f}", f"{c['share_of_prefill_off']:.2%}",
             f"{c['share_of_own_prefill']:.2%}" if "share_of_own_prefill" in c else "-")
            for name, c in costs.items()
        ],
    )  # fmt: skip
    content = {
        **described,
        "prefill_off_seconds": off,
        "samplers": costs,
        "turns": results,
    }
    write_results("samplers", content, options.out or f"samplers-{options.folder.name}")


if __name__ == "__main__":
    main()
