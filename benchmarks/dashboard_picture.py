"""Some panels of the dashboard as Grafana would lay them out, drawn with matplotlib from what Prometheus answered."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

from benchmarks.prometheus import Line

TITLES = (
    "Requests by outcome",
    "Time to first token",
    "Time per output token",
    "Visual tokens in, and after each sampler",
    "Share after both samplers",
    "Branches that regions choose",
    "Bytes between stages",
    "Cache look-ups",
    "Tiles waiting for a batch",
    "KV cache pages",
    "Prompt tokens reused",
    "Replicas wanted and there",
)
COLUMNS = 3
UNITS = {"reqps": "requests/s", "s": "s", "percent": "%", "Bps": "bytes/s", "bytes": "bytes", "short": ""}


def draw(drawn: dict[str, list[tuple[str, str, list[Line]]]], start: float, end: float, file: pathlib.Path) -> None:
    """drawn: as `benchmarks.dashboard.ask_panels` gives it; start, end: Unix time."""
    rows = -(-len(TITLES) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(4.6 * COLUMNS, 2.6 * rows), layout="constrained")
    for axis, title in zip(axes.flat, TITLES, strict=False):
        _panel(axis, title, drawn[title], start)
        axis.set_xlim(0, end - start)
    figure.savefig(file, dpi=70)
    plt.close(figure)
    Image.open(file).convert("RGB").quantize(32).save(file, optimize=True)  # a third of the bytes


def _panel(axis: plt.Axes, title: str, queries: list[tuple[str, str, list[Line]]], start: float) -> None:
    for legend, unit, lines in queries:
        axis.set_ylabel(UNITS.get(unit, unit.removeprefix("suffix: ")), fontsize=8)
        for labels, points in lines:
            times, values = [at - start for at, _ in points], [value for _, value in points]
            axis.plot(times, values, label=_label(legend, labels), linewidth=1.2)
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_ylim(bottom=0)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("s", fontsize=8)
    axis.legend(fontsize=6.5, frameon=False, loc="best")


def _label(legend: str, labels: Mapping[str, str]) -> str:
    """The legend with its labels' values, as Grafana writes it."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), legend)
