"""Charts and rows of pictures as SVG text: the same data gives the same bytes, in ink that follows the reader's theme.

Axes, letters and outlines are drawn in one ink that becomes `currentColor`; data are drawn in colours that are readable
on white and on black, and told apart by shape as well as by colour. Error bars are standard errors.
"""

from __future__ import annotations

import io
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from PIL import Image

from evaluation.focus_maps.drawing import branch_colour
from services.common.errors import InvalidInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7f7f7f")
"""Colours of Okabe and Ito's that contrast about three to one with white and with black alike."""
MARKERS = ("o", "s", "^", "D", "v")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "--")
"""A branch is told by its hatching too."""
INK = "#010203"
"""The colour that stands for `currentColor` while drawing, also in charts.mplstyle; nothing else has it."""
LIGHT_THEME_INK, DARK_THEME_INK = "#1c1c21", "#e6e6ea"
WIDTH_IN = 7.2
LETTERS_PER_IN, LINE_IN = 15, 0.16
"""Sizes of captions, in letters of 8 points."""
LEAST_LABELLED_PERCENT = 8
PLATE: Any = {
    "bbox": {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"},
    **{"ha": "center", "va": "center", "color": "black", "fontsize": 8},
}
"""How a number is written on a bar: black on white in either theme."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one kind; `error` has a standard error a point, NaN where there is none."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True)
class Run:
    """Branch shares of one training run against its step."""

    label: str
    steps: Sequence[float]
    shares: Sequence[Sequence[float]]
    """One list a step."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture under its caption."""

    image: Image.Image
    caption: str


def lines(panels: Mapping[str, Sequence[Series]], *, x_label: str, reference: Mapping[str, float] | None = None) -> str:
    """One panel an axis of values (its label is the key) side by side over a common x; reference: label of a panel ->
    a level drawn as a dotted line."""
    with _style():
        figure = _figure(WIDTH_IN, 3.2)
        for number, (y_label, series) in enumerate(panels.items()):
            axes = figure.add_subplot(1, len(panels), number + 1)
            for index, one in enumerate(series):
                _points(axes, one, number + index, joined=True)
            if reference and y_label in reference:
                axes.axhline(reference[y_label], color=INK, linestyle=":", linewidth=1)
            axes.set(xlabel=x_label, ylabel=y_label)
            axes.set_xticks(sorted({x for one in series for x in one.x}))
            axes.grid(axis="y")
            if len(series) > 1:
                axes.legend()
        return _svg(figure)


def scatter(series: Sequence[Series], *, x_label: str, y_label: str) -> str:
    """Points with error bars, a shape and colour a series, their names beside them in the legend."""
    with _style():
        figure = _figure(WIDTH_IN, 4.2)
        axes = figure.add_subplot()
        for index, one in enumerate(series):
            _points(axes, one, index, joined=False)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.grid()
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
        return _svg(figure)


def stacked_bars(bars: Mapping[str, Sequence[float]], branches: Sequence[str], *, x_label: str) -> str:
    """Horizontal bars of branch shares (0..1, finest first), the first on top; labelled where there is room."""
    with _style():
        figure = _figure(WIDTH_IN, 1.0 + 0.34 * len(bars))
        axes = figure.add_subplot()
        left = [0.0] * len(bars)
        for branch, name in enumerate(branches):
            widths = [100 * shares[branch] for shares in bars.values()]
            drawn = axes.barh(
                range(len(bars)), widths, left=left, label=name, color=_branch(branch), edgecolor=INK, linewidth=0.7
            )
            for patch in drawn:
                patch.set_hatch(HATCHES[branch % len(HATCHES)])
            for row, width in enumerate(widths):
                if width >= LEAST_LABELLED_PERCENT:
                    axes.text(left[row] + width / 2, row, f"{width:.0f}", **PLATE)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(bars)), list(bars))
        axes.invert_yaxis()
        axes.set(xlim=(0, 100), xlabel=x_label)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(branches))
        return _svg(figure)


def stacked_areas(rows: Sequence[Sequence[Run]], branches: Sequence[str], *, x_label: str) -> str:
    """Branch shares in percent against the step, a small chart a run, in rows."""
    columns = max(len(row) for row in rows)
    with _style():
        figure = _figure(WIDTH_IN, 0.8 + 1.5 * len(rows))
        legend: Any = None
        for row_number, row in enumerate(rows):
            for column, run in enumerate(row):
                axes = figure.add_subplot(len(rows), columns, row_number * columns + column + 1)
                shares = [[100 * step[branch] for step in run.shares] for branch in range(len(branches))]
                colours = [_branch(branch) for branch in range(len(branches))]
                look: Any = {"colors": colours, "labels": branches, "edgecolor": INK, "linewidth": 0.6}
                areas = axes.stackplot(run.steps, *shares, **look)
                for branch, area in enumerate(areas):
                    area.set_hatch(HATCHES[branch % len(HATCHES)])
                legend = legend or axes.get_legend_handles_labels()
                axes.set_title(run.label, loc="left")
                axes.set_ylim(0, 100)
                axes.margins(x=0)
                if row_number == len(rows) - 1:
                    axes.set_xlabel(x_label)
                if column == 0:
                    axes.set_ylabel("regions, %")
        figure.legend(*legend, loc="outside upper center", ncols=len(branches))
        return _svg(figure)


def pictures(rows: Sequence[Sequence[Picture]], *, key: Mapping[str, str] | None = None) -> str:
    """Rows of pictures at their own pixels; key: name -> colour, drawn as swatches above."""
    columns = max(len(row) for row in rows)
    across_in = WIDTH_IN / columns
    wrapped = [[textwrap.fill(one.caption, round(LETTERS_PER_IN * across_in)) for one in row] for row in rows]
    heights = [
        max(across_in * one.image.height / one.image.width for one in row)
        + LINE_IN * (1 + max(caption.count("\n") + 1 for caption in captions))
        for row, captions in zip(rows, wrapped, strict=True)
    ]
    with _style():
        figure = _figure(WIDTH_IN, sum(heights) + (2 * LINE_IN if key else 0))
        grid = figure.add_gridspec(len(rows), columns, height_ratios=heights)
        for row_number, (row, captions) in enumerate(zip(rows, wrapped, strict=True)):
            for column, (one, caption) in enumerate(zip(row, captions, strict=True)):
                axes = figure.add_subplot(grid[row_number, column])
                # "none" puts the picture's own pixels into the file; anything else resamples them to 72 an inch.
                axes.imshow(one.image, interpolation="none")
                axes.set_title(caption, fontsize=8, loc="left")
                axes.set_axis_off()
                axes.set_anchor("NW")
        if key:
            from matplotlib.patches import Patch

            swatches = [Patch(facecolor=colour, edgecolor=INK, label=name) for name, colour in key.items()]
            figure.legend(handles=swatches, loc="outside upper left", ncols=len(key), fontsize=8)
        return _svg(figure)


def described(svg: str, *, title: str, description: str) -> str:
    """The SVG with an accessible name and description, in the elements that the format has for them."""
    return _into_svg(svg, f"<title>{escape(title)}</title>\n <desc>{escape(description)}</desc>")


def _points(axes: Axes, one: Series, index: int, *, joined: bool) -> None:
    colour = PALETTE[index % len(PALETTE)]
    # A further round of the colours has other shapes.
    marker = MARKERS[(index + index // len(PALETTE)) % len(MARKERS)]
    look: Any = {"markersize": 6, "capsize": 3, "linewidth": 1.6, "linestyle": "-" if joined else ""}
    axes.errorbar(one.x, one.y, yerr=one.error or None, label=one.label, color=colour, marker=marker, **look)


def _branch(branch: int) -> str:
    """The colour that the focus maps give the branch."""
    return "#{:02x}{:02x}{:02x}".format(*branch_colour(branch))


def _style() -> Any:
    """matplotlib's settings while one chart is drawn. Raises InvalidInput where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise InvalidInput("is not installed; pip install '.[study]' in the source tree", field="matplotlib") from error
    return matplotlib.rc_context(fname=pathlib.Path(__file__).parent / "charts.mplstyle")


def _figure(width_in: float, height_in: float) -> Figure:
    # Not through pyplot, which keeps figures and chooses a window system.
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in), layout="constrained")


def _svg(figure: Figure) -> str:
    """The figure's SVG without date or version, its ink the theme's."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    theme = f"svg{{color:{LIGHT_THEME_INK}}}@media(prefers-color-scheme:dark){{svg{{color:{DARK_THEME_INK}}}}}"
    return _into_svg(file.getvalue().replace(INK, "currentColor"), f"<style>{theme}</style>")


def _into_svg(svg: str, element: str) -> str:
    """The SVG with one more first child of the root."""
    start = svg.index(">", svg.index("<svg ")) + 1
    return f"{svg[:start]}\n {element}{svg[start:]}"
