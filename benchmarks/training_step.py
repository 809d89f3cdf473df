"""A training step on images of 2,928 visual tokens at 50M parameters: both samplers at the paper's shares against off.

    python -m benchmarks.training_step --cores 0-1 [--out training_step]

A step is the loss and its gradients of one conversation about one 672 x 672 image, forward and backward, with random
weights and random words. The selector is moved until 49 % of the visual tokens are left, as in the paper; of these
about 73 % go on at the quarter of the depth ("both", 39 % converted) or at half of it, the mean of what training draws
("both, half"). Memory is the most bytes of live tensors beside weights and gradients (`benchmarks/live_memory.py`),
taken once: it does not vary. "count" is the encoder's pass before the step that a balance loss over several
micro-batches needs.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.device import wait
from benchmarks.live_memory import LiveMemory
from benchmarks.measure import (
    add_machine_options,
    machine,
    median,
    pin,
    print_table,
    ratio_of,
    take_turns,
    write_results,
)
from services.checkpoint.config import FocusLlavaConfig
from services.common.settings import build_settings
from services.common.types import ImageTiles
from services.compute.dtypes import choose_dtype, dtype_name
from services.compute.malloc import keep_freed_memory
from services.modeling.config import FocusLlavaModelConfig
from services.modeling.loss import IGNORED
from services.modeling.model import FocusLlavaForConditionalGeneration
from services.modeling.packing import TrainedSequence
from services.modeling.pruning import PruneDraw
from services.sampler.calibration import set_map_share
from training.plan.workload import PAPER_TEXT, PAPER_VISION

LAYERS = 12
WORDS, ANSWERS = 128, 64
SETTINGS: dict[str, int | None] = {"off": None, "both": LAYERS // 4, "both, half": LAYERS // 2}
"""The layer before which the text-guided sampler prunes; None has both samplers off."""
CONFIG: dict[str, Any] = {
    "image_token_id": 4095,
    "image_grid_pinpoints": [[672, 672]],
    "vision": {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 7,
        "num_attention_heads": 3,
        "image_size": 336,
        "patch_size": 14,
    },
    "text": {
        "model_type": "llama",
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
    },
    "vision_sampler": {"selector_input": "region", "probability_gate": "counterfactual"},
    "text_sampler": {"layer": LAYERS // 4},
}


class Bench:
    """The model, its conversation, and a step in each setting."""

    def __init__(self, dtype: torch.dtype, device: str):
        torch.manual_seed(0)
        config = build_settings(FocusLlavaConfig, CONFIG)
        model = FocusLlavaForConditionalGeneration(FocusLlavaModelConfig.of(config))
        self.model, self.device = model.to(device, dtype).train(), device  # type: ignore[arg-type]
        pixels = torch.randn(5, 3, 336, 336)
        image = ImageTiles(pixels_T3HW=pixels, image_size_hw=(672, 672), grid_hw=(2, 2))
        ids = torch.randint(10, 4000, (1 + WORDS,))
        ids[0] = config.image_token_id
        labels = torch.full_like(ids, IGNORED)
        labels[-ANSWERS:] = ids[-ANSWERS:]
        instruction = torch.zeros_like(ids, dtype=torch.bool)
        instruction[1:33] = True
        self.sequence = TrainedSequence(input_ids=ids, labels=labels, instruction=instruction, images=(image,))
        self._set_vision_share()
        self.threshold = PAPER_TEXT + 0.02  # what random weights need for the paper's share

    @torch.no_grad()
    def _set_vision_share(self) -> None:
        encoder = self.model.encoder
        sampler = encoder.vision_guided_sampler
        torch.nn.init.normal_(sampler.selector.linear.weight, std=0.1)
        (feature_map,) = encoder.project(self.sequence.images)
        full = encoder.tokens(feature_map, False).uncompressed_tokens
        base = len(feature_map.base_PD)
        seen = encoder.seen([feature_map])
        set_map_share(sampler, seen, (PAPER_VISION * full - base) / (full - base))

    def step(self, setting: str) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of a step and what it reports; the caller goes backward."""
        layer = SETTINGS[setting]
        draw = None if layer is None else PruneDraw(layer=layer, thresholds=(self.threshold,))
        return self.model.training_step(
            [self.sequence], draw=draw, vision_sampler=layer is not None, balance_weight=0.1
        )

    def seconds(self, setting: str, checkpointing: bool) -> float:
        """Seconds of a step, forward and backward."""
        self._checkpoint(checkpointing)
        wait(self.device)
        began = time.perf_counter()
        self.step(setting)[0].backward()
        wait(self.device)
        return time.perf_counter() - began

    def count_seconds(self) -> float:
        """Seconds of the encoder's pass before a step."""
        wait(self.device)
        began = time.perf_counter()
        self.model.count([self.sequence])
        wait(self.device)
        return time.perf_counter() - began

    def memory(self, setting: str, checkpointing: bool) -> tuple[int, dict[str, float]]:
        """Most bytes of a step's live tensors beside weights and gradients, and what the step reports."""
        self._checkpoint(checkpointing)
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        known = [*self.model.parameters(), *self.model.buffers(), *gradients, self.sequence.images[0].pixels_T3HW]
        with LiveMemory(known) as memory:
            loss, metrics = self.step(setting)
            loss.backward()
        return memory.peak, metrics

    def _checkpoint(self, on: bool) -> None:
        if on:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.activation_checkpointing_disable()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    add_machine_options(parser)
    options = parser.parse_args()
    pin(options.cores)
    keep_freed_memory()
    torch.set_num_threads(len(options.cores))
    dtype = choose_dtype(options.dtype, options.device)
    bench = Bench(dtype, options.device)
    elements = sum(parameter.numel() for parameter in bench.model.parameters())

    turns: dict[str, Callable[[], float]] = {"count": bench.count_seconds}
    for checkpointing in (False, True):
        for setting in SETTINGS:
            turns[_name(setting, checkpointing)] = functools.partial(bench.seconds, setting, checkpointing)
    results = take_turns(turns, options.rounds)
    rows, figures = [], []
    for checkpointing in (False, True):
        off = _name("off", checkpointing)
        most_off, _ = bench.memory("off", checkpointing)
        for setting in SETTINGS:
            name = _name(setting, checkpointing)
            most, metrics = bench.memory(setting, checkpointing)
            faster, least, greatest = ratio_of(results[off], results[name])
            left = metrics["visual_tokens"] / metrics["uncompressed_tokens"]
            kept = metrics["kept_tokens"] / metrics["visual_tokens"]
            seconds = median(results[name])
            figures.append({"setting": name, "seconds": seconds, "faster": [faster, least, greatest], "bytes": most,
                            "of_memory_off": most / most_off, "left": left, "kept": kept})  # fmt: skip
            rows.append((name, f"{seconds:.2f}", f"{faster:.2f} ({least:.2f} to {greatest:.2f})", f"{most / 1e6:,.0f}",
                         f"{most / most_off:.2f}", f"{left:.0%}", f"{kept:.0%}"))  # fmt: skip
    print(f"{elements / 1e6:.1f} M parameters, {dtype_name(dtype)}, count: {median(results['count']):.2f} s\n")
    print_table(("setting", "s", "times faster", "MB", "of off", "left by vision", "kept by text"), rows)
    if options.out:
        described = {"machine": machine(options.cores), "device": options.device, "dtype": dtype_name(dtype),
                     "parameters": elements, "rounds": options.rounds, "count_s": median(results["count"])}  # fmt: skip
        write_results("training_step", {**described, "settings": figures}, pathlib.Path(options.out))


def _name(setting: str, checkpointing: bool) -> str:
    return f"{setting}, checkpointed" if checkpointing else setting


if __name__ == "__main__":
    main()
