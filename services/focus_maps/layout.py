"""Where each visual token lies in the image: pixels of the original, through resizing, padding, unpadding and pooling.

Legend: H, W feature map, M regions in raster order, K branches, N visual tokens. A box is x0, y0, x1, y1 in pixels of
the upright original, x to the right, y down, edges and not pixel centres.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from services.checkpoint.config import FocusLlavaConfig
from services.common.errors import InvalidInput
from services.common.grid import best_resolution, resized_hw, unpadded_hw
from services.common.types import CompressedVisualTokens, FocusMap, FocusRegions

Edges = tuple[np.ndarray, np.ndarray]
"""Edges of a map's rows [H + 1] and columns [W + 1], float64, in pixels."""

NEWLINE = (-1, -1, -1, -1)
"""The cell of a token that closes a row."""


def layout(tokens: CompressedVisualTokens, config: FocusLlavaConfig, *, sampled: bool) -> FocusMap:
    """An image's map before a question is asked: every token kept, none important.

    tokens: read but for tokens_ND, of which the shape counts alone. sampled: whether the vision-guided sampler was
    asked for. Raises InvalidInput where the tokens are not those of such an image.
    """
    size_hw, map_hw, sampler, side = tokens.image_size_hw, tokens.map_hw, config.vision_sampler, config.patches_per_side
    if min(size_hw) < 1:
        raise InvalidInput(f"is {size_hw}, which an encoder of an older version leaves", field="image size")
    sampled = sampled and sampler.enabled
    by_row = sampler.token_order == "row"
    pooled = partial(pooled_cells, window=sampler.window, branches=sampler.branches, by_row=by_row)
    low_detail, mode = map_hw == (0, 0), sampler.base_tile if sampled else "keep"
    base = base_edges(size_hw, side)
    if mode == "keep":
        parts = [boxes_of(base, full_cells((side, side), newlines=False))]
    elif mode == "sample" or low_detail:
        branch_ids = tokens.base_branch_ids_M.numpy()
        parts = [boxes_of(base, pooled((side, side), branch_ids_M=branch_ids))]
    else:
        parts = [np.zeros((0, 4))]
    regions = None
    if low_detail:
        parts += [np.zeros((1, 4))] if mode == "keep" else []
    else:
        edges = map_edges(size_hw, config)
        if (len(edges[0]) - 1, len(edges[1]) - 1) != map_hw:
            raise InvalidInput(f"is {map_hw}, an image of {size_hw} has {[len(e) - 1 for e in edges]}", field="map")
        if sampled:
            branch_ids = tokens.branch_ids_M.numpy()
            parts.append(boxes_of(edges, pooled(map_hw, branch_ids_M=branch_ids)))
            y, x = (along[_region_edges(len(along) - 1, sampler.window)] for along in edges)
            if len(branch_ids):
                regions = FocusRegions(x=x, y=y, kernels=tuple(sampler.branches), branch_ids_M=branch_ids)
        else:
            parts.append(boxes_of(edges, full_cells(map_hw, newlines=True)))
    boxes_N4 = np.concatenate(parts).astype(np.float32)
    if len(boxes_N4) != len(tokens.tokens_ND):
        found = f"is {len(tokens.tokens_ND)}, an image of {size_hw} px with these branches has {len(boxes_N4)}"
        raise InvalidInput(found, field="number of visual tokens")
    return FocusMap(
        image_size_hw=size_hw,
        regions=regions,
        boxes_N4=boxes_N4,
        base_tokens=len(parts[0]),
        kept_N=np.ones(len(boxes_N4), bool),
        importance_N=None,
    )


def map_edges(size_hw: tuple[int, int], config: FocusLlavaConfig) -> Edges:
    """Edges of the unpadded feature map's tokens, clipped to the image.

    The steps of `tile_image` and `join_tiles` backwards: a token of the map is a patch of the padded canvas, in which
    the resized image lies off the corner.
    """
    canvas_hw, side = best_resolution(size_hw, config.image_grid_pinpoints), config.patches_per_side
    inner_h, inner_w = resized_hw(size_hw, canvas_hw)
    patch_px = config.tile_px / side
    rows, cols = (along // config.tile_px * side for along in canvas_hw)
    top, bottom, left, right = unpadded_hw(size_hw, (rows, cols))

    def edges(first: int, last: int, offset: int, inner: int, size: int) -> np.ndarray:
        canvas = np.arange(first, max(first, last) + 1) * patch_px
        return ((canvas - offset) * size / inner).clip(0, size)

    y = edges(top, bottom, (canvas_hw[0] - inner_h) // 2, inner_h, size_hw[0])
    return y, edges(left, right, (canvas_hw[1] - inner_w) // 2, inner_w, size_hw[1])


def base_edges(size_hw: tuple[int, int], side: int) -> Edges:
    """Edges of the base tile's tokens: the whole image in one tile, its aspect not kept."""
    steps = np.arange(side + 1) / side
    return steps * size_hw[0], steps * size_hw[1]


def boxes_of(edges: Edges, cells_N4: np.ndarray) -> np.ndarray:
    """Boxes of cells, float64 [N, 4]; four zeros for a newline."""
    y, x = edges
    top, left, bottom, right = cells_N4.T
    boxes_N4 = np.stack((x[left], y[top], x[right], y[bottom]), axis=1)
    boxes_N4[top < 0] = 0
    return boxes_N4


def full_cells(map_hw: tuple[int, int], *, newlines: bool) -> np.ndarray:
    """A cell a token of a map, int64 [N, 4]: top, left, bottom, right in tokens, row by row."""
    height, width = map_hw
    top, left = (index.ravel() for index in np.indices(map_hw))
    cells_HW4 = np.stack((top, left, top + 1, left + 1), axis=1).reshape(height, width, 4)
    if newlines:
        closing = np.broadcast_to(np.array(NEWLINE), (height, 1, 4))
        cells_HW4 = np.concatenate((cells_HW4, closing), axis=1)
    return cells_HW4.reshape(-1, 4)


def pooled_cells(
    map_hw: tuple[int, int],
    *,
    window: int,
    branches: Sequence[tuple[int, int]],
    branch_ids_M: np.ndarray,
    by_row: bool,
) -> np.ndarray:
    """The cells that the vision-guided sampler leaves of a map, as `full_cells`, in the order of its tokens.

    by_row: its token order is "row" and not "region". Raises InvalidInput for another number of regions than the map's.
    """
    height, width = map_hw
    rows, cols = -(-height // window), -(-width // window)
    if len(branch_ids_M) != rows * cols:
        raise InvalidInput(f"are {len(branch_ids_M)}, a map of {map_hw} has {rows * cols}", field="regions")
    parts, keys = [], []
    for branch, (tall, wide) in enumerate(branches):
        region = np.flatnonzero(branch_ids_M == branch)[:, None]
        if not tall or not len(region):  # a branch that drops
            continue
        inner = np.indices((window // tall, window // wide)).reshape(2, -1)
        top, left = region // cols * window + inner[0] * tall, region % cols * window + inner[1] * wide
        order = np.stack(
            (top, left) if by_row else (np.broadcast_to(region, top.shape), 0 * top + np.arange(len(inner[0])))
        )
        cells = np.stack((top, left, np.minimum(top + tall, height), np.minimum(left + wide, width)), axis=-1)
        real = (top < height) & (left < width)
        parts.append(cells[real])
        keys.append(order[:, real])
    tops = np.unique(np.concatenate([part[:, 0] for part in parts])) if parts else np.zeros(0, int)
    closed = tops if by_row else np.arange(rows if cols else 0) * cols + cols - 1
    parts.append(np.tile(NEWLINE, (len(closed), 1)))
    keys.append(np.stack((closed, np.full(len(closed), cols * window + window**2))))  # after all of its row
    first, second = np.concatenate(keys, axis=1)
    return np.concatenate(parts)[np.lexsort((second, first))]


def _region_edges(size: int, window: int) -> np.ndarray:
    """Indices of the tokens that regions begin at, and of the end."""
    return np.append(np.arange(0, size, window), size)
