"""All focus maps of one question on one page, with the question, the answer and what the colours mean."""

from __future__ import annotations

import numpy as np
import torch
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
    kept_of,
    scale_map,
    token_boxes,
)
from evaluation.focus_maps.focus import Focus
from evaluation.focus_maps.panels import FAINT, GAP_PX, INK, MARGIN_PX, PAPER, captioned, font_of, stacked, tiled

WIDTH_PX = 1600
CHOICES_A_ROW, LAYERS_A_ROW = 4, 6
MOST_LAYERS = 12
"""Panels of importance; a deeper model shows so many layers, the pruning layer among them. The JSON has them all."""


def page(focus: Focus) -> Image.Image:
    """The page, 1,600 pixels wide."""
    parts = [_header(focus), _legend(focus)]
    for index in range(len(focus.pictures)):
        parts += [_choices(focus, index), *_importance(focus, index)]
    return stacked(parts, WIDTH_PX)


def shown_layers(focus: Focus, most: int = MOST_LAYERS) -> list[int]:
    """At most so many of the layers 1..L-1, evenly spaced; the one that pruned is among them."""
    count = len(focus.importance_KN)
    layers = np.unique(np.linspace(1, count, min(most, count)).round().astype(int))
    pruning = focus.maps.prune_layer
    if pruning and pruning not in layers:
        layers[np.abs(layers - pruning).argmin()] = pruning
    return [int(layer) for layer in layers]


def _choices(focus: Focus, index: int) -> Image.Image:
    """The picture, its scale map, and what was kept of its two sets of tokens."""
    shown, where = focus.pictures[index], focus.maps.maps[index]
    width = _panel_width(CHOICES_A_ROW)
    box = (width - 4, width - 4)
    number = f"image {index + 1}" if len(focus.pictures) > 1 else "image"
    if where.regions:
        rows, cols = len(where.regions.y) - 1, len(where.regions.x) - 1
        scale = f"{len(where.boxes)} tokens of {shown.tokens.uncompressed_tokens}, {rows} x {cols} regions"
    else:
        scale = f"vision-guided sampler off, {len(where.boxes)} tokens"
    panels = [
        captioned(fitted(shown.picture, box), [number, f"{where.width} x {where.height} px"], width),
        captioned(scale_map(shown.picture, where, box), ["scale map: branch of each region", scale], width),
    ]
    sets: tuple[tuple[Tokens, str], ...] = (("map", "grid tiles"), ("base", "base tile"))
    closing = [kept for kept, box in zip(where.kept, where.boxes, strict=True) if box is None]
    newlines = f"; newlines {sum(closing)} of {len(closing)}"
    for tokens, name in sets:
        counts = f"{kept_of(where, tokens)} tokens{newlines if tokens == 'map' else ''}"
        panels.append(captioned(kept_map(shown.picture, where, tokens, box), [f"kept, {name}", counts], width))
    return tiled(panels, CHOICES_A_ROW)


def _importance(focus: Focus, index: int) -> list[Image.Image]:
    """Importance by layer, of the grid tiles' tokens and of the base tile's."""
    shown, where = focus.pictures[index], focus.maps.maps[index]
    boxed_N = torch.tensor([box is not None for one in focus.maps.maps for box in one.boxes])
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
            most = float(importance_N[boxed_N].max())
            own_N = focus.of_picture(importance_N, index)
            box = (width - 4, width - 4)
            drawing = importance_map(shown.picture, where, tokens, box, importance=own_N.tolist(), most=most)
            share = float(own_N[token_boxes(where, tokens)[0]].sum() / importance_N.sum())
            prunes = focus.maps.prune_layer == layer
            lines = [f"before layer {layer}{' (prunes)' if prunes else ''}", f"{name}: {100 * share:.0f} % of it"]
            panels.append(captioned(drawing, lines, width, strong=prunes))
        rows.append(tiled(panels, columns))
    return rows


def _panel_width(columns: int) -> int:
    return (WIDTH_PX - 2 * MARGIN_PX - (columns - 1) * GAP_PX) // columns


def _header(focus: Focus) -> Image.Image:
    usage, maps = focus.usage, focus.maps
    if not maps.prune_layer:
        pruned = "all of them kept in every layer"
    else:
        rule = f"keep ratio {maps.keep_ratio:g}" if maps.threshold is None else f"threshold {maps.threshold:g}"
        pruned = f"{usage.visual_tokens_kept} kept from layer {maps.prune_layer} of {usage.num_layers} on ({rule})"
    account = (
        f"visual tokens: {usage.visual_tokens_uncompressed} uncompressed, {usage.visual_tokens_sampled} after the "
        f"vision-guided sampler, {pruned}; {usage.converted_share_percent:.1f} % converted"
    )
    sheet = Image.new("RGB", (WIDTH_PX - 2 * MARGIN_PX, 2000), PAPER)
    top = 0
    for text, size, colour in ((focus.question, 30, INK), (f"answer: {focus.answer}", 24, INK), (account, 16, FAINT)):
        for line in _wrapped(text, font_of(size), sheet.width):
            ImageDraw.Draw(sheet).text((0, top), line, font=font_of(size), fill=colour)
            top += round(1.35 * size)
    return sheet.crop((0, 0, sheet.width, min(top, sheet.height)))


def _legend(focus: Focus) -> Image.Image:
    """Swatches of the branches and of kept tokens, and the scale of importance."""
    sheet = Image.new("RGB", (WIDTH_PX - 2 * MARGIN_PX, 60), PAPER)
    draw, font = ImageDraw.Draw(sheet), font_of(16)
    grids = [one.regions for one in focus.maps.maps if one.regions]
    left = 0.0
    entries: list[tuple[tuple[int, int, int], tuple[int, int, int] | None, str]] = []
    if grids:
        regions = sum(len(grid.branch_ids) for grid in grids)
        for branch, (height, width) in enumerate(grids[0].kernels):
            chosen = sum(grid.branch_ids.count(branch) for grid in grids)
            text = f"pooled {height}x{width}: {100 * chosen / regions:.0f} % of the regions"
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
