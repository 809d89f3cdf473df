"""Where each visual token lies in the image: pixels of the original picture, through resizing, padding and unpadding.

Legend: H, W unpadded feature map, M regions in raster order, w window, C cells of all branches of a region, N visual
tokens. A box is x0, y0, x1, y1 in pixels of the upright original, x to the right, y down, edges and not pixel centres.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from services.common.errors import InvalidInput
from services.common.types import CompressedVisualTokens, ImageTiles
from services.encoder.anyres import resized_hw, unpadded_hw
from services.sampler.vision_guided import TokenOrder, emit, pool, split_regions

Box = tuple[float, float, float, float]

FULL_RESOLUTION = ((1, 1),)


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """One image's visual tokens, in the order in which the language model gets them.

    Boxes are float64. Those of grid-tile tokens cover `map_box` without gap or overlap; the base tile's cover the image
    once more.
    """

    image_size_hw: tuple[int, int]
    boxes_N4: torch.Tensor
    """A token's box; NaN for a newline."""
    base_tokens: int
    """How many tokens, all at the beginning, are the base tile's, newlines of a sampled base tile included."""
    window: int
    """Side of a region, in tokens of the feature map; 1 with the vision-guided sampler off."""
    branches: tuple[tuple[int, int], ...]
    """Kernel (height, width) of each branch."""
    region_grid: tuple[int, int]
    """Rows and columns of regions."""
    region_boxes_M4: torch.Tensor
    branch_ids_M: torch.Tensor
    """int64 [M]; all 0 with the vision-guided sampler off."""
    map_box: Box
    """What the feature map shows. Unpadding drops whole rows and columns, as LLaVA-NeXT does: an edge of up to half a
    token's side may be seen by the base tile alone. All zeros where nothing is left: an image some 50 times as long as
    wide."""

    def __len__(self) -> int:
        return len(self.boxes_N4)

    @property
    def is_newline_N(self) -> torch.Tensor:
        return self.boxes_N4[:, 0].isnan()

    @property
    def is_base_N(self) -> torch.Tensor:
        """Tokens of the base tile that have a box."""
        return (torch.arange(len(self)) < self.base_tokens) & ~self.is_newline_N

    @property
    def is_map_N(self) -> torch.Tensor:
        """Tokens of the feature map that have a box."""
        return (torch.arange(len(self)) >= self.base_tokens) & ~self.is_newline_N

    def branch_shares(self) -> list[float]:
        """Share of the regions that chose each branch."""
        counts = torch.bincount(self.branch_ids_M, minlength=len(self.branches))
        return (counts / max(1, len(self.branch_ids_M))).tolist()


def layout(
    tiles: ImageTiles,
    tokens: CompressedVisualTokens,
    *,
    tile_px: int,
    patches_per_side: int,
    window: int,
    branches: Sequence[tuple[int, int]],
    order: TokenOrder,
    sampled: bool = True,
    base_tile: str = "keep",
    base_branch_ids_M: torch.Tensor | None = None,
) -> TokenLayout:
    """Where the visual tokens of one encoded image lie.

    order: the vision-guided sampler's. sampled: it was on; without it nothing from window on counts. base_tile: "keep",
    "sample" or "drop", as the checkpoint's vision sampler has it. base_branch_ids_M: for "sample", the branches that
    the base tile's own regions chose.
    Raises InvalidInput where tiles and tokens are not of one image.
    """
    corners_HW4 = map_corners(tiles, tile_px=tile_px, patches_per_side=patches_per_side)
    height, width = corners_HW4.shape[:2]
    branch_ids_M = tokens.branch_ids_M.long()
    if not sampled:
        # Rows of single tokens, each closed by a newline.
        window, branches, branch_ids_M = 1, FULL_RESOLUTION, torch.zeros(height * width, dtype=torch.int64)
    # A region's box is its pool by the largest kernel, whatever the branches are.
    region_boxes_M4 = pooled_boxes(corners_HW4, window, ((window, window),), torch.zeros_like(branch_ids_M), "region")
    map_boxes_N4 = pooled_boxes(corners_HW4, window, branches, branch_ids_M, order)
    base_N4 = base_corners(tiles.image_size_hw, patches_per_side)
    if sampled and base_tile == "sample":
        assert base_branch_ids_M is not None
        base_N4 = pooled_boxes(base_N4, window, branches, base_branch_ids_M, order)
    elif sampled and base_tile == "drop":
        base_N4 = base_N4[:0]
    base_N4 = base_N4.reshape(-1, 4)
    boxes_N4 = torch.cat((base_N4, map_boxes_N4))
    if tokens.map_hw != (height, width) or len(tokens.tokens_ND) != len(boxes_N4):
        raise InvalidInput(
            f"is {len(tokens.tokens_ND)} of a map of {tokens.map_hw}, the tiles give {len(boxes_N4)} of a map of "
            f"{(height, width)}",
            field="visual tokens",
        )
    x0, y0, x1, y1 = (0.0, 0.0, 0.0, 0.0)
    if height and width:
        (x0, y0), (x1, y1) = corners_HW4[0, 0, :2].tolist(), corners_HW4[-1, -1, 2:].tolist()
    return TokenLayout(
        image_size_hw=tiles.image_size_hw,
        boxes_N4=boxes_N4,
        base_tokens=len(base_N4),
        window=window,
        branches=tuple(branches),
        region_grid=(-(-height // window), -(-width // window)),
        region_boxes_M4=region_boxes_M4[~region_boxes_M4[:, 0].isnan()],
        branch_ids_M=branch_ids_M,
        map_box=(x0, y0, x1, y1),
    )


def map_corners(tiles: ImageTiles, *, tile_px: int, patches_per_side: int) -> torch.Tensor:
    """Box of each token of the unpadded feature map, float64 [H, W, 4], clipped to the image.

    The steps of `tile_image` and `join_tiles` backwards: a token of the map is a patch of the padded canvas, in which
    the resized image lies off the corner.
    """
    (rows, cols), (image_h, image_w) = tiles.grid_hw, tiles.image_size_hw
    canvas_hw = (rows * tile_px, cols * tile_px)
    inner_h, inner_w = resized_hw(tiles.image_size_hw, canvas_hw)
    top, bottom, left, right = unpadded_hw(tiles.image_size_hw, (rows * patches_per_side, cols * patches_per_side))
    patch_px = tile_px / patches_per_side

    def edges(first: int, last: int, offset: int, inner: int, size: int) -> torch.Tensor:
        canvas = torch.arange(first, last + 1, dtype=torch.float64) * patch_px
        return ((canvas - offset) * size / inner).clamp(0, size)

    y = edges(top, bottom, (canvas_hw[0] - inner_h) // 2, inner_h, image_h)
    x = edges(left, right, (canvas_hw[1] - inner_w) // 2, inner_w, image_w)
    return _corners(y, x)


def base_corners(image_size_hw: tuple[int, int], patches_per_side: int) -> torch.Tensor:
    """Box of each base-tile token, float64 [side, side, 4]: the whole image in one tile, its aspect not kept."""
    steps = torch.arange(patches_per_side + 1, dtype=torch.float64) / patches_per_side
    return _corners(steps * image_size_hw[0], steps * image_size_hw[1])


def pooled_boxes(
    corners_HW4: torch.Tensor,
    window: int,
    branches: Sequence[tuple[int, int]],
    branch_ids_M: torch.Tensor,
    order: TokenOrder,
) -> torch.Tensor:
    """Box of each token that the vision-guided sampler emits for these branches, [N, 4]; NaN for a newline.

    The sampler's own max-pool does it: the largest of (-x0, -y0, x1, y1) over a cell's real tokens is the cell's box.
    """
    sign = torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=corners_HW4.dtype)
    regions, real, grid = split_regions(corners_HW4 * sign, window)
    pooled = [pool(regions, real, kernel) for kernel in branches]
    boxes_N4, _ = emit(
        pooled, branches, branch_ids_M, torch.full((4,), torch.nan), grid=grid, window=window, order=order
    )
    return boxes_N4 * sign


def _corners(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Edges [H + 1] and [W + 1] to boxes [H, W, 4]."""
    height, width = len(y) - 1, len(x) - 1
    y0, x0 = y[:-1, None].expand(-1, width), x[:-1].expand(height, -1)
    y1, x1 = y[1:, None].expand(-1, width), x[1:].expand(height, -1)
    return torch.stack((x0, y0, x1, y1), dim=-1)
