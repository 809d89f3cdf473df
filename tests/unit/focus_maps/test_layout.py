"""Boxes of visual tokens: against pixels, and against the encoder itself, which pools the corners of its own tokens."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from services.checkpoint.config import FocusLlavaConfig, TextSamplerConfig, VisionSamplerConfig
from services.common.errors import InvalidInput
from services.common.types import CompressedVisualTokens, ImageTiles, ProjectedFeatureMap
from services.encoder.anyres import join_tiles, tile_image
from services.encoder.model import EncoderModel
from services.encoder.pipeline import EncoderPipeline, PreparedImage
from services.focus_maps.layout import Edges, base_edges, boxes_of, full_cells, layout, map_edges, pooled_cells
from tests.tiny_checkpoints import grid_pinpoints, text_fields, vision_fields

TILE, SIDE = 28, 4
PINPOINTS = (*grid_pinpoints(TILE), (2 * TILE, 3 * TILE), (TILE, TILE))
SIZES = ((97, 31), (31, 97), (123, 211), (200, 143), (250, 37), (16, 9), (5, 7), (56, 56), (55, 84), (3, 200), (200, 3))
SIGN = np.array([-1.0, -1.0, 1.0, 1.0])
SEVEN = ((1, 1), (2, 2), (4, 4), (4, 2), (2, 4), (2, 1), (1, 2))


def config_with(**sampler: object) -> FocusLlavaConfig:
    branches = sampler.get("branches", VisionSamplerConfig.branches)
    return FocusLlavaConfig(
        vision=vision_fields(width=8, layers=1, tile_px=TILE, patch_px=TILE // SIDE),
        text=text_fields("llama", hidden=4, layers=2, heads=1, kv_heads=1, context=64),
        image_token_id=3,
        image_grid_pinpoints=PINPOINTS,
        text_sampler=TextSamplerConfig(layer=1),
        vision_sampler=VisionSamplerConfig(
            base_grid=(SIDE, SIDE),
            selector_input="region",
            balance_coefficients=(1.0,) * len(branches),  # type: ignore[arg-type]
            **sampler,  # type: ignore[arg-type]
        ),
    )


CONFIG = config_with()


def tiles_of(size_hw: tuple[int, int], image: Image.Image | None = None, detail: str = "high") -> ImageTiles:
    image = image or Image.new("RGB", size_hw[::-1])
    return tile_image(image, tile_px=TILE, pinpoints=PINPOINTS, mean=(0, 0, 0), std=(1, 1, 1), detail=detail)  # type: ignore[arg-type]


def corners(edges: Edges) -> np.ndarray:
    """Boxes of a whole map's tokens, float64 [H, W, 4]."""
    height, width = (len(along) - 1 for along in edges)
    return boxes_of(edges, full_cells((height, width), newlines=False)).reshape(height, width, 4)


def assert_tiled(boxes_N4: np.ndarray, area_box: np.ndarray) -> None:
    """No gap, no overlap: all inside, no two share more than an edge, areas add up."""
    x0, y0, x1, y1 = boxes_N4.T
    assert (x0 >= area_box[0]).all() and (y0 >= area_box[1]).all()
    assert (x1 <= area_box[2]).all() and (y1 <= area_box[3]).all()
    assert (x1 > x0).all() and (y1 > y0).all()
    wide = (np.minimum(x1[:, None], x1) - np.maximum(x0[:, None], x0)).clip(min=0)
    high = (np.minimum(y1[:, None], y1) - np.maximum(y0[:, None], y0)).clip(min=0)
    shared = wide * high
    np.fill_diagonal(shared, 0)
    assert shared.max() < 1e-6
    expected = (area_box[2] - area_box[0]) * (area_box[3] - area_box[1])
    np.testing.assert_allclose(((x1 - x0) * (y1 - y0)).sum(), expected)


@pytest.mark.parametrize("size_hw", [(97, 31), (123, 211), (200, 143), (250, 37), (55, 84), (90, 252)])
def test_a_box_is_where_the_patchs_pixels_come_from(size_hw: tuple[int, int]) -> None:
    # Red is the column, green the row: a patch's mean colour is the centre of what it shows.
    y, x = np.mgrid[: size_hw[0], : size_hw[1]]
    tiles = tiles_of(size_hw, Image.fromarray(np.stack((x, y, 0 * x), axis=-1).astype(np.uint8)))
    patch = TILE // SIDE
    cut_TPD = tiles.pixels_T3HW[:, :2].unfold(2, patch, patch).unfold(3, patch, patch).mean((4, 5)).flatten(2) * 255
    found_HW2 = join_tiles(cut_TPD[1:].transpose(1, 2), tiles.grid_hw, size_hw).double().numpy()
    boxes_HW4 = corners(map_edges(size_hw, CONFIG))
    assert found_HW2.shape[:2] == boxes_HW4.shape[:2] and found_HW2.size > 0
    # Tokens all of whose pixels are the image's: the others have black padding in their mean.
    sides_HW2 = boxes_HW4[..., 2:] - boxes_HW4[..., :2]
    whole_HW = (sides_HW2 > sides_HW2.max((0, 1)) - 1e-6).all(-1)
    assert whole_HW.sum() >= 4
    centre_HW2 = (boxes_HW4[..., :2] + boxes_HW4[..., 2:]) / 2 - 0.5
    pixel = max(1.0, float(sides_HW2.max()) / patch)
    assert np.abs(found_HW2 - centre_HW2)[whole_HW].max() < 0.75 * pixel
    base_HW2 = cut_TPD[0].T.view(SIDE, SIDE, 2).double().numpy()
    base_HW4 = corners(base_edges(size_hw, SIDE))
    assert np.abs(base_HW2 - (base_HW4[..., :2] + base_HW4[..., 2:]) / 2 + 0.5).max() < 0.75 * pixel


@pytest.mark.parametrize("size_hw", SIZES)
@pytest.mark.parametrize("window", [4, 8])
@pytest.mark.parametrize("by_row", [False, True])
def test_boxes_tile_what_the_map_shows(size_hw: tuple[int, int], window: int, by_row: bool) -> None:
    edges = map_edges(size_hw, CONFIG)
    height, width = map_hw = len(edges[0]) - 1, len(edges[1]) - 1
    area = np.array([edges[1][0], edges[0][0], edges[1][-1], edges[0][-1]])
    rows, cols = -(-height // window), -(-width // window)
    drawn = np.random.default_rng(0).integers(len(SEVEN), size=rows * cols)
    for branch_ids_M in [np.full(rows * cols, branch) for branch in range(len(SEVEN))] + [drawn]:
        cells = pooled_cells(map_hw, window=window, branches=SEVEN, branch_ids_M=branch_ids_M, by_row=by_row)
        boxes_N4, newline_N = boxes_of(edges, cells), cells[:, 0] < 0
        if rows * cols:
            assert newline_N[-1]
            assert_tiled(boxes_N4[~newline_N], area)
    # Unpadding rounds to whole tokens: less than half of one, and the pixel that resizing rounds to, may be left out.
    if rows * cols:
        sides = np.array([np.diff(edges[1]).max(), np.diff(edges[0]).max()])
        pixel = sides * SIDE / TILE
        assert (area[:2] <= sides / 2 + pixel).all()
        assert (np.array(size_hw[::-1]) - area[2:] <= sides / 2 + pixel).all()
        assert (area[0] == 0 and area[2] == size_hw[1]) or (area[1] == 0 and area[3] == size_hw[0])


@pytest.mark.parametrize("order", ["region", "row"])
@pytest.mark.parametrize("base_tile", ["keep", "sample", "drop", "off"])
@pytest.mark.parametrize(("window", "branches"), [(4, ((1, 1), (2, 2), (4, 4))), (4, SEVEN), (2, ((1, 1), (0, 0)))])
def test_tokens_are_in_the_encoders_order(
    base_tile: str, window: int, branches: tuple[tuple[int, int], ...], order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where features are (-x0, -y0, x1, y1), the encoder's max-pool leaves each token its own box."""
    options = {} if base_tile == "off" else {"base_tile": base_tile}
    config = config_with(window=window, branches=branches, token_order=order, **options)
    torch.manual_seed(5)  # one with which several branches are chosen: asserted below
    model = EncoderModel(config).double().eval()
    torch.nn.init.normal_(model.vision_guided_sampler.selector.linear.weight, std=3.0)
    torch.nn.init.zeros_(model.vision_guided_sampler.selector.linear.bias)
    torch.nn.init.constant_(model.image_newline, torch.nan)
    pipeline, sampled = EncoderPipeline(model, "f" * 64), base_tile != "off"
    chosen: set[int] = set()
    for size_hw, detail in itertools.product(SIZES, ("high", "low")):
        edges = map_edges(size_hw, config)
        map_HWD = torch.from_numpy(corners(edges) * SIGN) if detail == "high" else torch.empty(0, 0, 4).double()
        base_HWD = torch.from_numpy(corners(base_edges(size_hw, SIDE)) * SIGN)
        feature_map = ProjectedFeatureMap(base_PD=base_HWD.flatten(0, 1), map_HWD=map_HWD)
        monkeypatch.setattr(model, "project", lambda images, made=feature_map: [made])
        prepared = PreparedImage(tiles=tiles_of(size_hw, detail=detail), content_hash="a" * 64, notes=())
        (tokens,) = pipeline.encode([prepared], [sampled])
        where = layout(tokens, config, sampled=sampled)
        expected_N4 = (tokens.tokens_ND.numpy() * SIGN).astype(np.float32)
        np.testing.assert_array_equal(where.boxes_N4, np.nan_to_num(expected_N4))
        assert where.kept_N.all() and where.importance_N is None and where.image_size_hw == size_hw
        if where.regions is not None:
            grid = len(where.regions.y) - 1, len(where.regions.x) - 1
            assert len(where.regions.branch_ids_M) == grid[0] * grid[1]
            assert (where.regions.x[-1], where.regions.y[-1]) == (edges[1][-1], edges[0][-1])
            chosen |= set(where.regions.branch_ids_M.tolist())
        else:
            assert not sampled or detail == "low" or not map_HWD.numel()
    assert len(chosen) >= (0 if base_tile == "off" else min(3, len(branches)))


def test_tokens_of_another_image_are_refused() -> None:
    model = EncoderModel(CONFIG).eval()
    (tokens,) = EncoderPipeline(model, "f" * 64).encode(
        [PreparedImage(tiles=tiles_of((97, 31)), content_hash="a" * 64, notes=())], [True]
    )
    layout(tokens, CONFIG, sampled=True)
    changed: dict[str, dict[str, object]] = {
        "number of visual tokens": {"tokens_ND": tokens.tokens_ND[:-1]},
        "image size": {"image_size_hw": (0, 0)},
        "map": {"image_size_hw": (31, 97)},
        "regions": {"branch_ids_M": tokens.branch_ids_M[:-1]},
    }
    for field, fields in changed.items():
        other = CompressedVisualTokens(**{**vars(tokens), **fields})  # type: ignore[arg-type]
        with pytest.raises(InvalidInput, match=f"^{field}: "):
            layout(other, CONFIG, sampled=True)
