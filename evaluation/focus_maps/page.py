"""All focus maps of one question on one page, with the question, the answer and what the colours mean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evaluation.focus_maps.drawing import (
    DIMMED,
    KEPT_COLOUR,
    Tokens,
    branch_colour,
    fitted,
    heat_colours,
    importance_map,
    kept_map,
    scale_map,
)
from evaluation.focus_maps.focus import Focus

WIDTH_PX, MARGIN_PX, GAP_PX = 1600, 28, 20
INK, FAINT, PAPER = (24, 24, 28), (96, 96, 104), (255, 255, 255)
CHOICES_A_ROW, LAYERS_A_ROW = 4, 6
MOST_LAYERS = 12
"""Panels of importance; a deeper model shows so many layers, the pruning layer among them. The JSON has them all."""


def page(focus: Focus) -> Image.Image:
    """The page, 1,600 pixels wide."""
    parts = [_header(focus), _legend(focus)]
    for index in range(len(focus.pictures)):
        parts += [_choices(focus, index), *_importance(focus, index)]
    sheet = Image.new("RGB", (WIDTH_PX, sum(part.height + GAP_PX for part in parts) + 2 * MARGIN_PX - GAP_PX), PAPER)
    top = MARGIN_PX
    for part in parts:
        sheet.paste(part, (MARGIN_PX, top))
        top += part.height + GAP_PX
    return sheet


def shown_layers(focus: Focus, most: int = MOST_LAYERS) -> list[int]:
    """At most so many of the layers 1..L-1, evenly spaced; the one that pruned is among them."""
    count = len(focus.importance_KN)
    layers = np.unique(np.linspace(1, count, min(most, count)).round().astype(int))
    if focus.decision is not None and focus.decision.layer not in layers:
        layers[np.abs(layers - focus.decision.layer).argmin()] = focus.decision.layer
    return [int(layer) for layer in layers]


def tiled(panels: Sequence[Image.Image], columns: int, gap_px: int = GAP_PX) -> Image.Image:
    """Panels of equal width side by side, in rows of `columns`, each at the top of its row."""
    rows = [panels[first : first + columns] for first in range(0, len(panels), columns)]
    heights = [max(panel.height for panel in row) for row in rows]
    step = panels[0].width + gap_px
    sheet = Image.new(
        "RGB", (step * min(columns, len(panels)) - gap_px, sum(heights) + gap_px * (len(rows) - 1)), PAPER
    )
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for column, panel in enumerate(row):
            sheet.paste(panel, (column * step, top))
        top += height + gap_px
    return sheet


def captioned(drawing: Image.Image, lines: Sequence[str], width: int, *, strong: bool = False) -> Image.Image:
    """A drawing under its caption, on paper of this width. strong: framed and its caption's first line underlined."""
    height = 22 * len(lines) + 4
    panel = Image.new("RGB", (width, height + drawing.height + 4), PAPER)
    draw = ImageDraw.Draw(panel)
    for number, line in enumerate(lines):
        draw.text((0, 22 * number), line, font=_font(16 if number == 0 else 14), fill=FAINT if number else INK)
    panel.paste(drawing, (2, height + 2))
    if strong:
        draw.rectangle((0, height, drawing.width + 3, height + drawing.height + 3), outline=KEPT_COLOUR, width=3)
        length = draw.textlength(lines[0], font=_font(16))
        draw.line((0, 20, length, 20), fill=KEPT_COLOUR, width=3)
    return panel


def _choices(focus: Focus, index: int) -> Image.Image:
    """The picture, its scale map, and what was kept of its two sets of tokens."""
    shown = focus.pictures[index]
    where, kept_N = shown.layout, focus.of_picture(focus.kept_N, index)
    width = _panel_width(CHOICES_A_ROW)
    box = (width - 4, width - 4)
    height_px, width_px = where.image_size_hw
    number = f"image {index + 1}" if len(focus.pictures) > 1 else "image"
    if len(shown.tokens.branch_ids_M):
        rows, cols = where.region_grid
        scale = f"{len(where)} tokens of {shown.tokens.uncompressed_tokens}, {rows} x {cols} regions"
    else:
        scale = f"vision-guided sampler off, {len(where)} tokens"
    panels = [
        captioned(fitted(shown.picture, box), [number, f"{width_px} x {height_px} px"], width),
        captioned(scale_map(shown, box), ["scale map: branch of each region", scale], width),
    ]
    sets: tuple[tuple[Tokens, str], ...] = (("map", "grid tiles"), ("base", "base tile"))
    newlines = f"; newlines {int((kept_N & where.is_newline_N).sum())} of {int(where.is_newline_N.sum())}"
    for tokens, name in sets:
        mask_N = where.is_map_N if tokens == "map" else where.is_base_N
        counts = f"{int((kept_N & mask_N).sum())} of {int(mask_N.sum())} tokens{newlines if tokens == 'map' else ''}"
        panels.append(captioned(kept_map(shown, kept_N, tokens, box), [f"kept, {name}", counts], width))
    return tiled(panels, CHOICES_A_ROW)


def _importance(focus: Focus, index: int) -> list[Image.Image]:
    """Importance by layer, of the grid tiles' tokens and of the base tile's."""
    shown, boxed_N = focus.pictures[index], [~picture.layout.is_newline_N for picture in focus.pictures]
    layers = shown_layers(focus)
    columns = max(CHOICES_A_ROW, min(LAYERS_A_ROW, len(layers)))
    width = _panel_width(columns)
    rows: list[Image.Image] = []
    sets: tuple[tuple[Tokens, str], ...] = (("map", "grid tiles"), ("base", "base tile"))
    for tokens, name in sets:
        panels = []
        for layer in layers:
            importance_N = focus.importance_KN[layer - 1]
            # One scale for all drawings of a layer.
            most = max(
                float(focus.of_picture(importance_N, other)[has_box_N].max())
                for other, has_box_N in enumerate(boxed_N)
                if has_box_N.any()
            )
            drawing = importance_map(
                shown, focus.of_picture(importance_N, index), tokens, (width - 4, width - 4), most=most
            )
            mask_N = shown.layout.is_map_N if tokens == "map" else shown.layout.is_base_N
            share = float(focus.of_picture(importance_N, index)[mask_N].sum() / importance_N.sum())
            prunes = focus.decision is not None and focus.decision.layer == layer
            lines = [f"before layer {layer}{' (prunes)' if prunes else ''}", f"{name}: {100 * share:.0f} % of it"]
            panels.append(captioned(drawing, lines, width, strong=prunes))
        rows.append(tiled(panels, columns))
    return rows


def _panel_width(columns: int) -> int:
    return (WIDTH_PX - 2 * MARGIN_PX - (columns - 1) * GAP_PX) // columns


def _header(focus: Focus) -> Image.Image:
    usage, decision = focus.usage, focus.decision
    if decision is None:
        pruned = "all of them kept in every layer"
    else:
        rule = (
            f"keep ratio {decision.keep_ratio:g}" if decision.threshold is None else f"threshold {decision.threshold:g}"
        )
        pruned = f"{usage.visual_tokens_kept} kept from layer {decision.layer} of {usage.num_layers} on ({rule})"
    account = (
        f"visual tokens: {usage.visual_tokens_uncompressed} uncompressed, {usage.visual_tokens_sampled} after the "
        f"vision-guided sampler, {pruned}; {usage.converted_share_percent:.1f} % converted"
    )
    sheet = Image.new("RGB", (WIDTH_PX - 2 * MARGIN_PX, 2000), PAPER)
    top = 0
    for text, size, colour in ((focus.question, 30, INK), (f"answer: {focus.answer}", 24, INK), (account, 16, FAINT)):
        for line in _wrapped(text, _font(size), sheet.width):
            ImageDraw.Draw(sheet).text((0, top), line, font=_font(size), fill=colour)
            top += round(1.35 * size)
    return sheet.crop((0, 0, sheet.width, min(top, sheet.height)))


def _legend(focus: Focus) -> Image.Image:
    """Swatches of the branches and of kept tokens, and the scale of importance."""
    sheet = Image.new("RGB", (WIDTH_PX - 2 * MARGIN_PX, 60), PAPER)
    draw, font = ImageDraw.Draw(sheet), _font(16)
    sampled = next((p.layout for p in focus.pictures if len(p.tokens.branch_ids_M)), None)
    left = 0.0
    entries: list[tuple[tuple[int, int, int], tuple[int, int, int] | None, str]] = []
    if sampled is not None:
        regions = sum(len(p.tokens.branch_ids_M) for p in focus.pictures)
        for branch, (height, width) in enumerate(sampled.branches):
            chosen = sum(int((p.tokens.branch_ids_M == branch).sum()) for p in focus.pictures)
            tokens = (sampled.window // height) * (sampled.window // width)
            text = (
                f"pooled {height}x{width}: {tokens} token{'s' * (tokens > 1)} a region, {100 * chosen / regions:.0f} %"
            )
            entries.append((branch_colour(branch), None, text))
    dropped = round(255 * DIMMED)
    entries += [(PAPER, KEPT_COLOUR, "kept for this question"), ((dropped, dropped, dropped), None, "dropped")]
    for fill, outline, text in entries:
        draw.rectangle((left, 4, left + 18, 22), fill=fill, outline=outline or fill, width=3)
        draw.text((left + 26, 4), text, font=font, fill=INK)
        left += 26 + draw.textlength(text, font=font) + 28
    bar = np.broadcast_to(heat_colours(np.sqrt(np.linspace(0, 1, 200))), (18, 200, 3))
    text = "importance of a token (Eq. 8), had the model pruned before that layer: 0"
    draw.text((0, 36), text, font=font, fill=INK)
    left = draw.textlength(text, font=font) + 8
    sheet.paste(Image.fromarray(np.ascontiguousarray(bar).round().astype(np.uint8)), (round(left), 36))
    draw.text((left + 208, 36), "the layer's largest", font=font, fill=INK)
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own, so that no machine draws with another; it knows Latin letters only."""
    return ImageFont.load_default(size)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines no wider than this, broken at spaces; a word by itself may be wider."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
