"""Focus maps: boxes against pixels and the sampler itself, importance against the engine and a naive loop, drawings."""

from __future__ import annotations

import io
import json
import pathlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.focus_maps.drawing import BRANCH_COLOURS, importance_map, kept_map, scale_map
from evaluation.focus_maps.focus import FocusModel
from evaluation.focus_maps.geometry import base_corners, layout, map_corners, pooled_boxes
from evaluation.focus_maps.page import page, shown_layers
from evaluation.focus_maps.report import explain, report
from services.checkpoint.config import FocusLlavaConfig, TextSamplerConfig, VisionSamplerConfig
from services.common.errors import InvalidInput
from services.common.types import CompressedVisualTokens, ImageTiles, ProjectedFeatureMap
from services.encoder.anyres import join_tiles, tile_image
from services.encoder.model import EncoderModel
from services.sampler.text_guided import keep_by_share
from services.sampler.vision_guided import TokenOrder
from tests import tiny_llm
from tests.llm_reference import naive_kept
from tests.tiny_checkpoints import grid_pinpoints, make_random_checkpoint, text_fields, vision_fields

TILE, SIDE = 28, 4
PINPOINTS = (*grid_pinpoints(TILE), (2 * TILE, 3 * TILE), (TILE, TILE))
SIZES = ((97, 31), (31, 97), (123, 211), (200, 143), (250, 37), (16, 9), (5, 7), (56, 56), (55, 84), (3, 200))
SIGN = torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
SEVEN = ((1, 1), (2, 2), (4, 4), (4, 2), (2, 4), (2, 1), (1, 2))
SHIPPED = pathlib.Path(__file__).parents[3] / "checkpoints" / "focusllava-tiny"
SAMPLE = pathlib.Path(__file__).parents[3] / "docs" / "assets" / "sample.png"


def tiles_of(size_hw: tuple[int, int], image: Image.Image | None = None) -> ImageTiles:
    image = image or Image.new("RGB", size_hw[::-1])
    return tile_image(image, tile_px=TILE, pinpoints=PINPOINTS, mean=(0, 0, 0), std=(1, 1, 1))


def corners(size_hw: tuple[int, int]) -> torch.Tensor:
    return map_corners(tiles_of(size_hw), tile_px=TILE, patches_per_side=SIDE)


def png(size_hw: tuple[int, int], seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size_hw, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def assert_tiled(boxes_N4: torch.Tensor, area_box: torch.Tensor) -> None:
    """No gap, no overlap: all inside, no two share more than an edge, areas add up."""
    x0, y0, x1, y1 = boxes_N4.unbind(1)
    assert (x0 >= area_box[0]).all() and (y0 >= area_box[1]).all()
    assert (x1 <= area_box[2]).all() and (y1 <= area_box[3]).all()
    assert (x1 > x0).all() and (y1 > y0).all()
    wide = (torch.minimum(x1[:, None], x1) - torch.maximum(x0[:, None], x0)).clamp(min=0)
    high = (torch.minimum(y1[:, None], y1) - torch.maximum(y0[:, None], y0)).clamp(min=0)
    shared = (wide * high).fill_diagonal_(0)
    assert shared.max() < 1e-6
    expected = (area_box[2] - area_box[0]) * (area_box[3] - area_box[1])
    torch.testing.assert_close(((x1 - x0) * (y1 - y0)).sum(), expected)


@pytest.mark.parametrize("size_hw", [(97, 31), (123, 211), (200, 143), (250, 37), (55, 84), (90, 252)])
def test_a_box_is_where_the_patchs_pixels_come_from(size_hw: tuple[int, int]) -> None:
    # Red is the column, green the row: a patch's mean colour is the centre of what it shows.
    y, x = np.mgrid[: size_hw[0], : size_hw[1]]
    tiles = tiles_of(size_hw, Image.fromarray(np.stack((x, y, 0 * x), axis=-1).astype(np.uint8)))
    patch = TILE // SIDE
    cut_TPD = tiles.pixels_T3HW[:, :2].unfold(2, patch, patch).unfold(3, patch, patch).mean((4, 5)).flatten(2) * 255
    found_HW2 = join_tiles(cut_TPD[1:].transpose(1, 2), tiles.grid_hw, size_hw).double()
    boxes_HW4 = corners(size_hw)
    assert found_HW2.shape[:2] == boxes_HW4.shape[:2] and found_HW2.numel() > 0
    # Tokens all of whose pixels are the image's: the others have black padding in their mean.
    sides_HW2 = boxes_HW4[..., 2:] - boxes_HW4[..., :2]
    whole_HW = (sides_HW2 > sides_HW2.flatten(0, 1).amax(0) - 1e-6).all(-1)
    assert whole_HW.sum() >= 4
    centre_HW2 = (boxes_HW4[..., :2] + boxes_HW4[..., 2:]) / 2 - 0.5
    pixel = max(1.0, float(sides_HW2.max()) / patch)
    assert (found_HW2 - centre_HW2)[whole_HW].abs().max() < 0.75 * pixel
    base_HW2 = cut_TPD[0].T.view(SIDE, SIDE, 2).double()
    base_HW4 = base_corners(size_hw, SIDE)
    assert (base_HW2 - (base_HW4[..., :2] + base_HW4[..., 2:]) / 2 + 0.5).abs().max() < 0.75 * pixel


@pytest.mark.parametrize("size_hw", SIZES)
@pytest.mark.parametrize("window", [1, 4, 8])
@pytest.mark.parametrize("order", ["region", "row"])
def test_boxes_of_one_branch_tile_what_the_map_shows(size_hw: tuple[int, int], window: int, order: TokenOrder) -> None:
    corners_HW4 = corners(size_hw)
    area = torch.cat((corners_HW4[0, 0, :2], corners_HW4[-1, -1, 2:])) if corners_HW4.numel() else torch.zeros(4)
    rows, cols = (-(-size // window) for size in corners_HW4.shape[:2])
    branches = ((1, 1),) if window == 1 else SEVEN
    drawn = torch.randint(len(branches), (rows * cols,), generator=torch.Generator().manual_seed(0))
    for branch_ids_M in [torch.full((rows * cols,), branch) for branch in range(len(branches))] + [drawn]:
        boxes_N4 = pooled_boxes(corners_HW4, window, branches, branch_ids_M, order)
        newline_N = boxes_N4[:, 0].isnan()
        if order == "region":
            assert int(newline_N.sum()) == rows
        else:
            # Down from row to row, to the right in each: as the tops and left sides of the boxes say.
            ends = newline_N.nonzero().flatten().tolist()
            lines = [boxes_N4[start:end] for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]
            assert all((line_N4[:, 1] == line_N4[0, 1]).all() and (line_N4[1:, 0] > line_N4[:-1, 0]).all()
                       for line_N4 in lines)  # fmt: skip
            tops = [float(line_N4[0, 1]) for line_N4 in lines]
            assert tops == sorted(set(tops))
        if rows * cols:
            assert newline_N[-1]
            assert_tiled(boxes_N4[~newline_N], area.double())
    # Unpadding rounds to whole tokens: less than half of one, and the pixel that resizing rounds to, may be left out.
    if rows * cols:
        token = (corners_HW4[..., 2:] - corners_HW4[..., :2]).flatten(0, 1).amax(0)
        pixel = token * SIDE / TILE
        assert (area[:2] <= token / 2 + pixel).all()
        assert (torch.tensor(size_hw[::-1]) - area[2:] <= token / 2 + pixel).all()
        assert area[0] == 0 and area[2] == size_hw[1] or area[1] == 0 and area[3] == size_hw[0]


@pytest.mark.parametrize("order", ["region", "row"])
@pytest.mark.parametrize("base_tile", ["keep", "sample", "drop", "off"])
@pytest.mark.parametrize(("window", "branches"), [(4, ((1, 1), (2, 2), (4, 4))), (4, SEVEN), (2, ((1, 1), (2, 2)))])
def test_tokens_are_in_the_encoders_order(
    base_tile: str, window: int, branches: tuple[tuple[int, int], ...], order: TokenOrder
) -> None:
    """The encoder pools the corners of its own tokens: the largest (-x0, -y0, x1, y1) of a pool is its box."""
    options: dict[str, Any] = {} if base_tile == "off" else {"base_tile": base_tile}
    config = FocusLlavaConfig(
        vision=vision_fields(width=8, layers=1, tile_px=TILE, patch_px=TILE // SIDE),
        text=text_fields("llama", hidden=4, layers=2, heads=1, kv_heads=1, context=64),
        image_token_id=3,
        image_grid_pinpoints=PINPOINTS,
        text_sampler=TextSamplerConfig(layer=1),
        vision_sampler=VisionSamplerConfig(
            window=window,
            branches=branches,
            base_grid=(SIDE, SIDE),
            selector_input="region",
            balance_coefficients=(1.0,) * len(branches),
            token_order=order,
            **options,
        ),
    )
    torch.manual_seed(5)  # one with which several branches are chosen: asserted below
    model = EncoderModel(config).double().eval()
    torch.nn.init.normal_(model.vision_guided_sampler.selector.linear.weight, std=3.0)
    torch.nn.init.zeros_(model.vision_guided_sampler.selector.linear.bias)
    torch.nn.init.constant_(model.image_newline, torch.nan)
    chosen: set[int] = set()
    for size_hw in SIZES:
        base_HWD, map_HWD = base_corners(size_hw, SIDE) * SIGN, corners(size_hw) * SIGN
        feature_map = ProjectedFeatureMap(base_PD=base_HWD.flatten(0, 1), map_HWD=map_HWD)
        with torch.no_grad():
            encoded = model.tokens(feature_map, base_tile != "off")
            base = model.vision_guided_sampler(base_HWD, feature_map.base_PD, model.image_newline)
        tokens = CompressedVisualTokens(
            tokens_ND=encoded.tokens_ND,
            branch_ids_M=encoded.sampled.branch_ids_M if encoded.sampled else torch.empty(0, dtype=torch.uint8),
            map_hw=encoded.map_hw,
            uncompressed_tokens=encoded.uncompressed_tokens,
            content_hash="",
            model_fingerprint="",
        )
        arguments: dict[str, Any] = {
            "tile_px": TILE,
            "patches_per_side": SIDE,
            "window": window,
            "branches": branches,
            "order": order,
            "sampled": base_tile != "off",
            "base_tile": base_tile,
            "base_branch_ids_M": base.branch_ids_M,
        }
        where = layout(tiles_of(size_hw), tokens, **arguments)
        assert len(where) == len(tokens.tokens_ND)
        torch.testing.assert_close(where.boxes_N4, encoded.tokens_ND * SIGN, rtol=0, atol=0, equal_nan=True)
        assert len(where.branch_ids_M) == len(where.region_boxes_M4) == where.region_grid[0] * where.region_grid[1]
        if len(where.branch_ids_M):
            assert_tiled(where.region_boxes_M4, torch.tensor(where.map_box, dtype=torch.float64))
            assert sum(where.branch_shares()) == pytest.approx(1)
        assert int(where.is_base_N.sum() + where.is_map_N.sum() + where.is_newline_N.sum()) == len(where)
        chosen |= set(where.branch_ids_M.tolist())
        one_more_ND = torch.cat((tokens.tokens_ND, torch.zeros(1, 4)))
        with pytest.raises(InvalidInput, match="visual tokens"):
            layout(tiles_of(size_hw), replace(tokens, tokens_ND=one_more_ND), **arguments)
    assert len(chosen) >= (1 if base_tile == "off" else min(3, len(branches)))


@pytest.fixture(scope="module")
def shipped() -> FocusModel:
    return FocusModel(SHIPPED)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def random_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("checkpoint") / request.param
    sampler = VisionSamplerConfig(base_grid=(4, 4), similarity="normalized", base_tile="sample")
    make_random_checkpoint(folder, request.param, vision_sampler=sampler)
    return folder, FocusModel(folder)


def test_importance_where_the_model_prunes_is_the_engines_own(shipped: FocusModel, random_model: Any) -> None:
    for model in (shipped, random_model[1]):
        pictures = [model.encode(png((90, 61))), model.encode(png((5, 9), seed=1)), model.encode(png((70, 200)))]
        for chosen, prune in (
            (pictures[:1], {}),
            (pictures, {"threshold": 0.4}),
            (pictures[1:], {"keep_ratio": 0.3}),
        ):
            focus = model.ask(chosen, "What number is on the red card?", **prune, max_tokens=3)
            decision = focus.decision
            assert decision is not None and decision.layer == model.pipeline.config.text_sampler.layer
            assert focus.importance_KN.shape[0] == model.local.engine.decoder.num_layers - 1
            assert torch.equal(focus.importance_KN[decision.layer - 1], decision.importance)
            assert focus.kept_N.nonzero().flatten().tolist() == decision.kept.tolist()
            assert 0 < focus.usage.visual_tokens_kept == len(decision.kept) < len(focus.kept_N)
            assert sum(len(picture.layout) for picture in chosen) == focus.usage.visual_tokens_sampled
        unpruned = model.ask(chosen, "What number is on the red card?", text_sampler=False)
        assert unpruned.decision is None and unpruned.kept_N.all()
        assert torch.equal(unpruned.importance_KN, focus.importance_KN)
        model.local.engine.check_integrity()


def test_importance_of_every_layer_is_that_of_an_unpruned_pass_in_transformers(random_model: Any) -> None:
    folder, model = random_model
    picture = model.encode(png((61, 44)))
    focus = model.ask([picture], tiny_llm.QUESTIONS[0], max_tokens=1)
    lm = tiny_llm.reference_lm(folder)
    asked = replace(tiny_llm.request(model.local.engine), images=(picture.tokens,))
    prompt = model.local.engine.prepare(asked).prompt
    embeddings_SD = tiny_llm.reference_embeddings(lm, model.local.engine, asked)
    with torch.no_grad():
        hidden = lm(inputs_embeds=embeddings_SD[None], output_hidden_states=True).hidden_states
        rotary = lm.model.rotary_emb(embeddings_SD[None], torch.arange(len(embeddings_SD))[None])
        for layer in range(1, tiny_llm.LAYERS):
            kept = naive_kept(
                lm.model.layers[layer],
                hidden[layer][0],
                rotary,
                list(prompt.instruction_positions),
                prompt.visual_positions().tolist(),
                0.6,
            )
            assert keep_by_share(focus.importance_KN[layer - 1], 0.6).tolist() == kept
            assert 0 < len(kept) < len(focus.kept_N)


def test_two_questions_about_one_image_keep_different_places(shipped: FocusModel) -> None:
    picture = shipped.encode(SAMPLE.read_bytes())
    height, width = picture.layout.image_size_hw
    boxes_N4 = picture.layout.boxes_N4 / torch.tensor([width, height, width, height])
    centre_N2 = (boxes_N4[:, :2] + boxes_N4[:, 2:]) / 2
    # Centres of the red card and of the yellow one, as fractions (docs/assets/sample.png).
    on_N = [
        ((centre_N2 - torch.tensor(centre)).abs() < 0.1).all(1) & picture.layout.is_map_N
        for centre in ((0.36, 0.57), (0.91, 0.43))
    ]
    for asked, (question, answer) in enumerate(
        (("What number is on the red card?", "60"), ("What word is on the yellow card?", "hen"))
    ):
        focus = shipped.ask([picture], question)
        importance_N = focus.importance_KN[1]
        assert focus.answer == answer
        # Words before the colour cannot know which card is meant, so a part of the mean lies elsewhere.
        own, other = (float(importance_N[on].sum()) for on in (on_N[asked], on_N[1 - asked]))
        assert own > 0.3 and own > 5 * other
        assert focus.kept_N[on_N[asked]].any()
    shares = [focus.importance_by_kind(layer) for layer in range(1, 6)]
    assert all(sum(share.values()) == pytest.approx(1) for share in shares)


def test_drawings_show_what_was_chosen(shipped: FocusModel) -> None:
    picture = shipped.encode(SAMPLE.read_bytes())
    focus, where = shipped.ask([picture], "What number is on the red card?"), picture.layout
    size = picture.picture.size
    kept = np.asarray(kept_map(picture, focus.kept_N, box_wh=size)).astype(int)
    heat = np.asarray(importance_map(picture, focus.importance_KN[1], box_wh=size)).astype(int)
    scales = np.asarray(scale_map(picture, size)).astype(int)
    original = np.asarray(picture.picture).astype(int)
    for index in where.is_map_N.nonzero().flatten().tolist():
        x0, y0, x1, y1 = where.boxes_N4[index].round().long().tolist()
        inside = slice(y0 + 2, y1 - 2), slice(x0 + 2, x1 - 2)
        assert np.array_equal(kept[inside], original[inside]) == bool(focus.kept_N[index])
    for region, (x0, y0, x1, y1) in enumerate(where.region_boxes_M4.round().long().tolist()):
        # A quarter of a token off the corner: no line of any branch passes there.
        y, x = y0 + (y1 - y0) // 16, x0 + (x1 - x0) // 16
        tint = np.array(BRANCH_COLOURS[int(where.branch_ids_M[region])])
        assert np.abs(scales[y, x] - (original[y, x] + tint) / 2).max() <= 1
    best = focus.importance_KN[1].masked_fill(~where.is_map_N, 0).argmax()
    x0, y0, x1, y1 = where.boxes_N4[best].round().long().tolist()
    rest = np.ones(heat.shape[:2], dtype=bool)
    rest[y0:y1, x0:x1] = False
    assert heat[y0:y1, x0:x1].sum(-1).mean() > heat[rest].sum(-1).mean() + 150


def test_a_page_for_several_images_and_with_both_samplers_off(random_model: Any) -> None:
    _, model = random_model
    sizes = ((90, 61), (5, 9), (3, 200))
    pictures = [model.encode(png(size, seed)) for seed, size in enumerate(sizes)]
    focus = model.ask(pictures, "How many? " * 30, max_tokens=2)
    assert page(focus).width == 1600
    assert shown_layers(focus) == [1, 2, 3, 4, 5] and shown_layers(focus, most=2) in ([1, 5], [2, 5])
    assert 2 in shown_layers(focus, most=2)
    plain = model.ask([model.encode(png((90, 61)), vision_sampler=False)], "How?", text_sampler=False)
    assert page(plain).width == 1600
    made = report(focus, ["a", "b", "c"])
    assert json.loads(json.dumps(made)) == made and made["visual_tokens"]["kept"] == len(focus.decision.kept)
    assert made["layers"] == [1, 2, 3, 4, 5] and made["pruning"]["layer"] == 2
    kept, count = [], 0
    for image, size in zip(made["images"], sizes, strict=True):
        assert image["size_wh"] == [size[1], size[0]] and image["first_token"] == count
        assert {len(row) for row in image["importance"]} == {len(image["boxes"])}
        assert image["boxes"].count(None) >= image["region_grid"][0]
        kept += [image["first_token"] + index for index in image["kept"]]
        count += len(image["boxes"])
    assert kept == focus.decision.kept.tolist() and count == made["visual_tokens"]["sampled"]
    assert report(plain, ["a"])["pruning"] is None


def test_what_cannot_be_explained_is_refused(shipped: FocusModel, tmp_path: pathlib.Path) -> None:
    with pytest.raises(InvalidInput, match="images"):
        shipped.ask([], "What?")
    with pytest.raises(InvalidInput, match="no words"):
        shipped.ask([shipped.encode(png((9, 9)))], " ")
    for output in (tmp_path / "focus.jpg", tmp_path / "missing" / "focus.png"):
        with pytest.raises(InvalidInput, match="output"):
            explain(SHIPPED, [("a", png((9, 9)))], "What?", output)
