"""Tables of what several replicas do: conversations that stay at one, and replicas that come and go by the work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.measure import median_of

SIGNALS = {
    "tiles": "focusllava_encoder_tiles",
    "prefill tokens": "focusllava_prefill_tokens_left",
    "KV, %": "focusllava_kv_percent_wanted",
    "answers": "focusllava_answers",
}
"""Columns, and the gauges that the policies read."""


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def affinity(turns: dict[str, list[dict[str, float]]]) -> str:
    """A line a peer: medians over its rounds."""
    rows = []
    for name, mine in turns.items():
        middle = median_of(mine)
        share = middle["prompt_tokens_reused"] / middle["follow_up_prompt_tokens"]
        rows.append([
            name, f"{middle['follow_up_prompt_tokens']:.0f}", f"{middle['prompt_tokens_reused']:.0f}", f"{share:.0%}",
            f"{middle['first_turn_ttft_p50_ms']:.0f}", f"{middle['follow_up_ttft_p50_ms']:.0f}",
            f"{middle['follow_up_ttft_p95_ms']:.0f}", f"{middle['seconds']:.1f}",
        ])  # fmt: skip
    header = ("turns go to", "tokens of a follow-up", "found in the cache", "share", "TTFT of a first turn, ms",
              "of a follow-up, p50", "p95", "seconds in all")  # fmt: skip
    return markdown(header, rows)


def autoscaling(points: Iterable[dict[str, Any]]) -> str:
    """A line for each moment at which load or replicas changed, with the most of each signal since the line before."""
    rows: list[list[object]] = []
    before: tuple[Any, ...] = ()
    most: dict[str, float] = {}
    for point in points:
        most = {name: max(most.get(name, 0.0), point[name]) for name in SIGNALS}
        now = point["phase"], point["encoder"], point["llm"]
        if now != before:
            rows.append([*now[:1], f"{point['seconds']:.0f}", *now[1:], *(f"{most[name]:.0f}" for name in SIGNALS)])
            before, most = now, {}
    return markdown(("load", "after, s", "encoders", "language models", *SIGNALS), rows)
