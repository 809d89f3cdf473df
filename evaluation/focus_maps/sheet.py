"""What both samplers chose for an answer, on one sheet: `focusllava ask --map`."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from evaluation.focus_maps.drawing import Tokens, importance_map, kept_map, kept_of, scale_map
from evaluation.focus_maps.panels import GAP_PX, MARGIN_PX, captioned, stacked, tiled
from focusllava.focus_maps import FocusMap, FocusMaps
from services.common.media import open_image

PANEL_PX = 400


def focus_sheet(files: Sequence[bytes], focus: FocusMaps) -> Image.Image:
    """A row an image: the regions' scales, and for each set of tokens what was kept and how important it was.

    files: the images of the question, in order.
    """
    rows = [_row(open_image(file).image, where) for file, where in zip(files, focus.maps, strict=True)]
    return stacked(rows, 2 * MARGIN_PX + max(row.width for row in rows))


def _row(picture: Image.Image, where: FocusMap) -> Image.Image:
    box = (PANEL_PX - 4, PANEL_PX - 4)
    number = f"image {where.image + 1}, {where.width} x {where.height} px, {len(where.boxes)} tokens"
    scales = "vision-guided sampler off"
    if where.regions:
        shares = zip(where.regions.kernels, where.regions.branch_shares(), strict=True)
        scales = "; ".join(f"{height}x{width} {100 * share:.0f} %" for (height, width), share in shares)
    panels = [captioned(scale_map(picture, where, box), [number, scales], PANEL_PX)]
    sets: tuple[tuple[Tokens, str], ...] = (("map", "grid tiles"), ("base", "base tile"))
    for tokens, name in sets:
        said = [f"kept, {name}", f"{kept_of(where, tokens)} tokens"]
        panels.append(captioned(kept_map(picture, where, tokens, box), said, PANEL_PX))
        if where.importance:
            drawn = importance_map(picture, where, tokens, box)
            panels.append(captioned(drawn, [f"importance, {name}", "light is more"], PANEL_PX))
    return tiled(panels, len(panels), GAP_PX)
