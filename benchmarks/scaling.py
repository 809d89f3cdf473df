"""Cost against the size of the image, against the length of the answer, and against requests in flight.

    python -m benchmarks.scaling FOLDER --cores 0-1

The whole pipeline from image bytes, samplers off and both, in turns. The last column is both over off in requests per
second: where it is near 1 or below, compression does not pay.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import pathlib
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.device import set_up
from benchmarks.measure import (
    add_machine_options,
    median_of,
    print_table,
    ratio_of,
    summary,
    take_turns,
    write_results,
)
from benchmarks.stages import SETTINGS, Stages, mean_usage


@dataclass(frozen=True, kw_only=True)
class Point:
    """One place on one axis."""

    axis: str
    size_hw: tuple[int, int] = (672, 672)
    new_tokens: int = 32
    concurrency: int = 4


POINTS = (
    # Grids of 1 x 2, 2 x 1, 2 x 2 and 1 x 3 tiles; a small picture is padded, so its map is small.
    *(Point(axis="image", size_hw=size) for size in ((64, 672), (168, 672), (336, 672), (672, 672), (336, 1008))),
    *(Point(axis="answer", size_hw=(168, 672), new_tokens=count) for count in (1, 32, 128, 256)),
    *(Point(axis="answer", new_tokens=count) for count in (1, 32, 128, 256)),
    *(Point(axis="in flight", concurrency=count) for count in (1, 2, 4, 8, 16)),
)


class Scaling:
    """One pipeline; a turn answers a point's requests with one setting."""

    def __init__(self, stages: Stages):
        self.stages = stages
        self._pictures = itertools.count(10_000)

    def turn(self, point: Point, setting: str) -> dict[str, float]:
        self.stages.size_hw = point.size_hw
        requests = list(itertools.islice(self._pictures, max(point.concurrency, 2)))
        turn = self.stages.run(
            requests, concurrency=point.concurrency, new_tokens=point.new_tokens, setting=SETTINGS[setting]
        )
        figures = summary(turn.seconds, turn.timelines)
        return {**figures, "peak_kv_bytes": turn.peak_kv_bytes, **mean_usage([turn])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="holds `focusllava`")
    parser.add_argument("--axes", nargs="+", choices=("image", "answer", "in flight"),
                        default=["image", "answer", "in flight"])  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, help="leave out points of longer answers")
    parser.add_argument("--max-concurrency", type=int, help="leave out points of more requests in flight")
    parser.add_argument("--kv-cache-mib", type=int, default=2048)
    add_machine_options(parser)
    options = parser.parse_args()
    dtype, described = set_up(options)
    checkpoint, pool = options.folder / "focusllava", options.kv_cache_mib * 2**20
    bench = Scaling(Stages(checkpoint, dtype=dtype, kv_cache_bytes=pool, device=options.device))
    points = [
        p
        for p in POINTS
        if p.axis in options.axes
        and p.new_tokens <= (options.max_new_tokens or p.new_tokens)
        and p.concurrency <= (options.max_concurrency or p.concurrency)
    ]
    rows: list[list[object]] = []
    content: dict[str, Any] = {
        **described,
        "points": [],
    }
    for point in points:
        turns = {name: functools.partial(bench.turn, point, name) for name in ("off", "both")}
        results = take_turns(turns, options.rounds, options.warm_up)
        rates = {name: [turn["requests_per_s"] for turn in result] for name, result in results.items()}
        ratio, least, greatest = ratio_of(rates["both"], rates["off"])
        medians = {name: median_of(result) for name, result in results.items()}
        off, both = medians["off"], medians["both"]
        rows.append([
            point.axis, f"{point.size_hw[0]} x {point.size_hw[1]}", point.new_tokens, point.concurrency,
            f"{off['visual_tokens_uncompressed']:.0f}", f"{off['requests_per_s']:.2f}", f"{both['requests_per_s']:.2f}",
            f"{off['ttft_p50_ms']:.0f}", f"{both['ttft_p50_ms']:.0f}", f"{off['tpot_p50_ms']:.1f}",
            f"{both['tpot_p50_ms']:.1f}", f"{ratio:.2f}",
        ])  # fmt: skip
        place = {**asdict(point), "both_over_off": ratio, "least": least, "greatest": greatest}
        content["points"].append({**place, "medians": medians, "turns": results})
    header = ("axis", "image", "tokens", "in flight", "visual", "off req/s", "both req/s", "off TTFT", "both TTFT ms",
              "off TPOT", "both TPOT ms", "both/off")  # fmt: skip
    print_table(header, rows)
    bench.stages.close()
    write_results("scaling", content, options.out or f"scaling-{options.folder.name}")


if __name__ == "__main__":
    main()
