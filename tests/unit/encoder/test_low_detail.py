"""Low detail: one tile through the vision tower, the base tile's visual tokens and a newline out of the encoder."""

from __future__ import annotations

import asyncio
import dataclasses
import io

import pytest
import torch
from PIL import Image

from focusllava.v1 import image_pb2
from services.checkpoint.config import FocusLlavaConfig
from services.common import wire
from services.common.errors import InvalidInput
from services.common.types import ImageOptions
from services.encoder.batcher import TileBatcher
from services.encoder.model import EncoderModel
from services.encoder.pipeline import EncoderPipeline
from services.sampler.vision_guided import split_regions
from tests.tiny_checkpoints import make_random_checkpoint

LOW, HIGH = ImageOptions(detail="low"), ImageOptions()


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> FocusLlavaConfig:
    folder = tmp_path_factory.mktemp("low") / "checkpoint"
    make_random_checkpoint(folder)
    return FocusLlavaConfig.load(folder)


def pipeline_of(config: FocusLlavaConfig, base_tile: str) -> EncoderPipeline:
    torch.manual_seed(0)
    sampler = dataclasses.replace(config.vision_sampler, base_tile=base_tile)
    return EncoderPipeline(EncoderModel(dataclasses.replace(config, vision_sampler=sampler)), "f" * 64)


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    image.paste((200, 30, 60), (0, 0, width // 2, height // 3))
    image.save(file, "PNG")
    return file.getvalue()


def encoded(pipeline: EncoderPipeline, image: bytes, options: ImageOptions, on: bool):
    (tokens,) = pipeline.encode([pipeline.prepare(image, on, options)], [on])
    return tokens


@pytest.mark.parametrize("on", [True, False])
def test_it_is_the_base_tile_and_one_newline(config, on):
    pipeline = pipeline_of(config, "keep")
    patches = config.patches_per_side**2
    low, high = (encoded(pipeline, png(120, 90), options, on) for options in (LOW, HIGH))
    assert low.tokens_ND.shape[0] == low.uncompressed_tokens == patches + 1 < len(high.tokens_ND)
    torch.testing.assert_close(low.tokens_ND[:-1], high.tokens_ND[:patches])
    assert torch.equal(low.tokens_ND[-1], pipeline.model.image_newline)
    assert low.map_hw == (0, 0) and not low.branch_ids_M.numel()
    received = wire.tokens_from_proto(wire.tokens_to_proto(low))
    assert torch.equal(received.tokens_ND, low.tokens_ND) and received.map_hw == (0, 0)


@pytest.mark.parametrize("base_tile", ["sample", "drop"])
def test_where_the_model_sees_no_whole_base_tile_it_is_sampled_like_a_map(config, base_tile):
    pipeline = pipeline_of(config, base_tile)
    sampler, side = pipeline.model.vision_guided_sampler, config.patches_per_side
    torch.nn.init.zeros_(sampler.selector.linear.bias)
    torch.nn.init.ones_(sampler.selector.linear.bias[-1:])  # the coarsest branch, everywhere
    low = encoded(pipeline, png(120, 90), LOW, True)
    regions, _, (rows, _) = split_regions(torch.zeros(side, side, 1), sampler.window)
    assert len(low.tokens_ND) == len(regions) + rows < low.uncompressed_tokens == side**2 + 1
    whole = encoded(pipeline, png(120, 90), LOW, False)
    assert len(whole.tokens_ND) == side**2 + 1, "with the sampler off nothing is sampled"


@pytest.mark.parametrize("base_tile", ["keep", "sample", "drop"])
def test_a_ribbon_too_narrow_for_its_grid_is_answered(config, base_tile):
    tokens = encoded(pipeline_of(config, base_tile), png(396, 4), LOW, True)
    assert len(tokens.tokens_ND) and tokens.notes == ()


async def test_one_batch_of_both_details_runs_one_tile_for_the_low_one(config):
    pipeline, tiles = pipeline_of(config, "keep"), []
    batcher = TileBatcher(pipeline, max_tiles=40, max_wait_s=0.2, on_batch=tiles.append)
    image = png(56, 56)
    low, high, again = await asyncio.gather(
        batcher.encode(image, True, LOW), batcher.encode(image, True, HIGH), batcher.encode(image, False, LOW)
    )
    await batcher.close()
    assert sum(tiles) == 1 + 5 + 1
    for found, options, on in ((low, LOW, True), (high, HIGH, True), (again, LOW, False)):
        alone = encoded(pipeline, image, options, on)
        torch.testing.assert_close(found.tokens_ND, alone.tokens_ND)
        assert found.uncompressed_tokens == alone.uncompressed_tokens


@pytest.mark.parametrize("detail", ["low", "high"])
@pytest.mark.parametrize("reduced, map_share", [(None, None), (True, 0.3), (False, 1.0)])
def test_options_cross_the_wire(detail, reduced, map_share):
    options = ImageOptions(detail=detail, reduced_jpeg=reduced, map_share=map_share)
    assert wire.image_options_from_proto(wire.image_options_to_proto(options)) == options


def test_unset_options_are_the_defaults_and_an_unknown_detail_is_named():
    assert wire.image_options_from_proto(image_pb2.ImageOptions()) == ImageOptions()
    with pytest.raises(InvalidInput, match=r"^here\.detail: is 7, expected IMAGE_DETAIL_LOW or IMAGE_DETAIL_HIGH"):
        wire.image_options_from_proto(image_pb2.ImageOptions(detail=7), "here")  # type: ignore[arg-type]
