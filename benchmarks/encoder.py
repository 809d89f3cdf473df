"""Throughput of the encoder stage: images and tiles a second, from JPEG bytes to visual tokens.

    python -m benchmarks.encoder FOLDER --cores 0-1

Requests go through the stage's own TileBatcher, so many at a time. Variants take turns: large photographs decoded at
reduced scale and in full, and pictures as large as the grid, of which nothing can be left out. A second table says what
one image's preparation costs by itself.
"""

from __future__ import annotations

import argparse
import asyncio
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
from benchmarks.workload import jpeg
from services.common.types import ImageOptions
from services.encoder.batcher import TileBatcher
from services.encoder.pipeline import EncoderPipeline

VARIANTS = {
    "grid size": ((672, 672), True),
    "photo": ((2250, 3000), True),
    "photo, decoded in full": ((2250, 3000), False),
}
"""Name -> height and width of the JPEG, reduced decoding on."""


class EncoderBench:
    """One encoder, shared by the variants."""

    def __init__(self, checkpoint: pathlib.Path, device: str, dtype: torch.dtype, max_tiles: int):
        self.pipeline = EncoderPipeline.from_checkpoint(checkpoint, dtype=dtype, device=device)
        self.max_tiles = max_tiles
        self._seeds = itertools.count()

    def turn(self, variant: str, concurrency: int, images: int) -> dict[str, float]:
        """`images` requests, at most `concurrency` in flight."""
        size_hw, reduced = VARIANTS[variant]
        files = [jpeg(next(self._seeds) % 16, *size_hw) for _ in range(images)]
        return asyncio.run(self._serve(ImageOptions(reduced_jpeg=reduced), files, concurrency))

    async def _serve(self, options: ImageOptions, files: list[bytes], concurrency: int) -> dict[str, float]:
        tiles: list[int] = []
        batcher = TileBatcher(self.pipeline, max_tiles=self.max_tiles, on_batch=tiles.append)
        seconds: list[float] = []
        places = asyncio.Semaphore(concurrency)

        async def one(file: bytes) -> None:
            async with places:
                began = time.perf_counter()
                await batcher.encode(file, True, options)
                seconds.append(time.perf_counter() - began)

        began = time.perf_counter()
        await asyncio.gather(*map(one, files))
        total = time.perf_counter() - began
        await batcher.close()
        return {
            "images_per_s": len(files) / total,
            "tiles_per_s": sum(tiles) / total,
            "tiles_per_batch": sum(tiles) / len(tiles),
            "latency_p50_ms": 1e3 * percentile(seconds, 0.5),
            "latency_p99_ms": 1e3 * percentile(seconds, 0.99),
        }

    def preparation(self, variant: str) -> float:
        """Milliseconds of one thread for decoding and tiling one image."""
        size_hw, reduced = VARIANTS[variant]
        file = jpeg(0, *size_hw)
        began = time.thread_time()
        self.pipeline.prepare(file, options=ImageOptions(reduced_jpeg=reduced))
        return 1e3 * (time.thread_time() - began)

    def model_ms(self, images: int) -> float:
        """Milliseconds of vision tower, projector and sampler for a batch of 672 x 672 images."""
        prepared = [self.pipeline.prepare(jpeg(0))] * images
        began = time.perf_counter()
        self.pipeline.encode(prepared, [True] * images)
        return 1e3 * (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="holds `focusllava`")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--images", type=int, default=32, help="a turn")
    parser.add_argument("--max-tiles", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    add_machine_options(parser)
    options = parser.parse_args()
    dtype, described = set_up(options, ("torch", "transformers", "pillow"))
    bench = EncoderBench(options.folder / "focusllava", options.device, dtype, options.max_tiles)
    content: dict[str, Any] = {
        **described,
        "max_tiles": options.max_tiles,
        "concurrency": {},
    }
    for concurrency in options.concurrency:
        images = min(options.images, 4 * math.ceil(concurrency))
        turns = {name: functools.partial(bench.turn, name, concurrency, images) for name in VARIANTS}
        results = take_turns(turns, options.rounds)
        print(f"\n{concurrency} in flight")
        columns = ("images_per_s", "tiles_per_s", "tiles_per_batch", "latency_p50_ms", "latency_p99_ms")
        medians = {name: median_of(result) for name, result in results.items()}
        rows = [[name, *(f"{middle[c]:.1f}" for c in columns)] for name, middle in medians.items()]
        print_table(("JPEG", "images/s", "tiles/s", "tiles a batch", "p50 ms", "p99 ms"), rows)
        content["concurrency"][concurrency] = {"images": images, "medians": medians, "turns": results}
    parts: dict[str, Any] = {f"prepare {name}": functools.partial(bench.preparation, name) for name in VARIANTS}
    parts |= {f"model, {count} images": functools.partial(bench.model_ms, count) for count in (1, 4)}
    content["parts_ms"] = {name: median(values) for name, values in take_turns(parts, options.rounds).items()}
    print("\none image's preparation (a thread's time), one batch of the model")
    print_table(("part", "ms"), [[name, f"{value:.1f}"] for name, value in content["parts_ms"].items()])
    write_results("encoder", content, options.out or f"encoder-{options.folder.name}")


if __name__ == "__main__":
    main()
