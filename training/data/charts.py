"""Small bar charts: coloured bars of one to nine units beside an axis with few labels."""

import random
from dataclasses import dataclass

from PIL import ImageDraw

from training.data.fonts import Box
from training.data.panels import INK, LINE_PX, Place, Text, draw_paper, draw_text, fill_box, set_text, text_width
from training.data.scenes import RGB, jittered
from training.data.vocabulary import COLOURS

BAR_COUNT = (2, 5)
TOP_VALUE = (5, 9)
"""Last unit of the axis. One digit, so that no chart writes a number that a card could show."""
UNIT_PX = (5, 8)
"""Height of one unit: a bar is read by comparing it with lines this far apart."""
BAR_WIDTH_PX, BAR_GAP_PX = (7, 10), (3, 5)
TICK_STEPS = (2, 3)
"""Units from one label of the axis to the next, where so many have room for it."""
TICK_FONTS_PX = (11, 12)
PADDING_PX = 7
BAR_TOP_PX = 4
"""Height of the strip around a bar's upper edge."""
GRID_LINE, BORDER = (196, 196, 196), (150, 150, 150)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar; its box ends at the axis."""

    box_xyxy: Box
    colour: str
    fill: RGB
    value: int
    """Height in units of the axis, from 1."""

    @property
    def top_xyxy(self) -> Box:
        """The strip around its upper edge, where it is read."""
        x0, top, x1, _ = self.box_xyxy
        return x0, top - BAR_TOP_PX / 2, x1, top + BAR_TOP_PX / 2


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A bar chart, in model pixels. Bars differ in colour and in value, so that one is the tallest."""

    box_xyxy: Box
    plot_xyxy: Box
    """The area between the axes, up to the last unit."""
    top_value: int
    bars: tuple[Bar, ...]
    ticks: tuple[Text, ...]


def sample_chart(rng: random.Random, place: Place) -> Chart | None:
    """A random chart where `place` finds room for it; None when there is none."""
    count, top_value, unit = rng.randint(*BAR_COUNT), rng.randint(*TOP_VALUE), rng.randint(*UNIT_PX)
    bar_width, gap, font_px = rng.randint(*BAR_WIDTH_PX), rng.randint(*BAR_GAP_PX), rng.choice(TICK_FONTS_PX)
    label_width = round(max(text_width(str(value), font_px) for value in range(10)))
    left_margin, plot_width = PADDING_PX + label_width + 3, gap + count * (bar_width + gap)
    box = place((left_margin + plot_width + PADDING_PX, top_value * unit + 2 * PADDING_PX))
    if box is None:
        return None
    left, top = box[0] + left_margin, box[1] + PADDING_PX
    right, bottom = left + plot_width, top + top_value * unit
    values = rng.sample(range(1, top_value + 1), count)
    bars = []
    for index, (colour, value) in enumerate(zip(rng.sample(list(COLOURS), count), values, strict=True)):
        x = left + gap + index * (bar_width + gap)
        bar_box = (x, bottom - value * unit, x + bar_width, bottom)
        bars.append(Bar(box_xyxy=bar_box, colour=colour, fill=jittered(rng, COLOURS[colour]), value=value))
    steps = [step for step in TICK_STEPS if step * unit > font_px]
    labelled = range(0, top_value + 1, rng.choice(steps))
    label_x = box[0] + PADDING_PX - 1 + label_width / 2
    return Chart(
        box_xyxy=box,
        plot_xyxy=(left, top, right, bottom),
        top_value=top_value,
        bars=tuple(bars),
        ticks=tuple(set_text(str(value), font_px, (label_x, bottom - value * unit)) for value in labelled),
    )


def draw_chart(draw: ImageDraw.ImageDraw, chart: Chart, scale: float) -> None:
    """Lines at every unit, then bars, axes and labels."""
    draw_paper(draw, chart.box_xyxy, scale, BORDER)
    left, top, right, bottom = chart.plot_xyxy
    for value in range(1, chart.top_value + 1):
        y = bottom - value * (bottom - top) / chart.top_value
        fill_box(draw, (left, y, right, y + LINE_PX), scale, GRID_LINE)
    for bar in chart.bars:
        fill_box(draw, bar.box_xyxy, scale, bar.fill)
    fill_box(draw, (left - LINE_PX, top, left, bottom), scale, INK)
    fill_box(draw, (left - LINE_PX, bottom, right, bottom + LINE_PX), scale, INK)
    for tick in chart.ticks:
        draw_text(draw, tick, scale)
