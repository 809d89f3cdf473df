"""The encoder stage around its model: narrow images, the layer that features come from, and what is sent."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig

from services.checkpoint.config import FocusLlavaConfig
from services.common import wire
from services.common.errors import InternalError, InvalidInput
from services.common.settings import build_settings
from services.common.types import CompressedVisualTokens, ProjectedFeatureMap
from services.encoder.deployment import Delivery, EncoderSettings, encode_response
from services.encoder.model import EncoderModel
from services.encoder.pipeline import EncoderPipeline
from services.encoder.vision_tower import build_vision_tower, feature_depth, patch_features
from services.sampler.calibration import finer_for_share, set_map_share
from tests.tiny_checkpoints import make_random_checkpoint, vision_fields

NARROW = "too narrow for the grid: only the thumbnail is seen"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("pipeline") / "checkpoint"
    make_random_checkpoint(path)
    return path


def with_base_tile(folder, base_tile: str) -> FocusLlavaConfig:
    config = FocusLlavaConfig.load(folder)
    return dataclasses.replace(config, vision_sampler=dataclasses.replace(config.vision_sampler, base_tile=base_tile))


def pipeline_of(folder, base_tile: str) -> EncoderPipeline:
    torch.manual_seed(0)
    return EncoderPipeline(EncoderModel(with_base_tile(folder, base_tile)), "f" * 64)


def png(width: int, height: int, mode: str = "RGB", colour: object = (200, 30, 60)) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height), colour).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("size_wh", [(396, 4), (4, 396), (100, 1)])
@pytest.mark.parametrize("on", [True, False])
def test_an_image_too_narrow_for_its_grid_says_so(folder, size_wh, on):
    pipeline = pipeline_of(folder, "keep")
    (tokens,) = pipeline.encode([pipeline.prepare(png(*size_wh), on)], [on])
    assert 0 in tokens.map_hw and tokens.notes == (NARROW,)
    assert len(tokens.tokens_ND) >= pipeline.config.patches_per_side**2
    assert pipeline.prepare(png(*size_wh, "LA", (0, 0)), on).notes == ("transparent image: drawn on white", NARROW)


@pytest.mark.parametrize("size_wh", [(60, 20), (20, 60), (1, 1), (28, 28)])
def test_other_images_have_no_such_note(folder, size_wh):
    pipeline = pipeline_of(folder, "drop")
    image = pipeline.prepare(png(*size_wh))
    (tokens,) = pipeline.encode([image], [True])
    assert 0 not in tokens.map_hw and tokens.notes == () and len(tokens.tokens_ND)


def test_where_no_token_would_be_left_a_narrow_image_is_refused(folder):
    pipeline = pipeline_of(folder, "drop")
    with pytest.raises(InvalidInput, match="^image: is 396 x 4 pixels, too narrow"):
        pipeline.prepare(png(396, 4))
    # Without the vision sampler the base tile stays.
    (tokens,) = pipeline.encode([pipeline.prepare(png(396, 4), vision_sampler=False)], [False])
    assert len(tokens.tokens_ND) and tokens.notes == (NARROW,)


def test_held_to_a_share_the_base_tile_is_sampled_as_it_will_be_served(folder):
    torch.manual_seed(0)
    model = EncoderModel(with_base_tile(folder, "sample")).eval()
    torch.nn.init.normal_(model.vision_guided_sampler.selector.linear.weight, std=0.05)
    side, width = model.config.patches_per_side, model.config.text_config.hidden_size
    maps = [ProjectedFeatureMap(base_PD=torch.randn(side**2, width), map_HWD=torch.randn(2 * side, 3 * side, width))
            for _ in range(6)]  # fmt: skip
    with torch.no_grad():
        as_it_is = [model.tokens(feature_map, True).tokens_ND for feature_map in maps]
        seen = model.seen(maps)
        finer = finer_for_share(model.vision_guided_sampler, seen, 0.4)
        trained = [model.tokens(feature_map, True, finer=finer).tokens_ND for feature_map in maps]
        set_map_share(model.vision_guided_sampler, seen, 0.4)
        served = [model.tokens(feature_map, True).tokens_ND for feature_map in maps]
    assert [len(tokens) for tokens in as_it_is] != [len(tokens) for tokens in served]
    for left, right in zip(trained, served, strict=True):
        assert torch.equal(left, right)


def test_features_come_from_the_hidden_state_that_is_named():
    torch.manual_seed(0)
    tower = build_vision_tower(CLIPVisionConfig(**vision_fields(width=32, layers=3, tile_px=28, patch_px=7))).eval()
    pixels = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        states = tower(pixels, output_hidden_states=True).hidden_states
        for layer in range(-4, 4):
            torch.testing.assert_close(patch_features(tower, pixels, layer), states[layer][:, 1:])
    assert [feature_depth(3, layer) for layer in range(-4, 4)] == [0, 1, 2, 3, 0, 1, 2, 3]
    for layer in (-6, -5, 4):
        with pytest.raises(InvalidInput, match=f"vision_feature_layer: is {layer}, expected -4 to 3"):
            patch_features(tower, pixels, layer)


def visual_tokens(tokens_ND: torch.Tensor) -> CompressedVisualTokens:
    return CompressedVisualTokens(
        tokens_ND=tokens_ND,
        branch_ids_M=torch.empty(0, dtype=torch.uint8),
        map_hw=(1, 1),
        uncompressed_tokens=3,
        content_hash="a" * 64,
        model_fingerprint="b" * 64,
    )


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_visual_tokens_are_sent_in_the_wire_s_dtype(dtype):
    delivery = Delivery(dtype=getattr(torch, dtype))
    sent = wire.tokens_from_proto(encode_response(visual_tokens(torch.ones(3, 4)), delivery).visual_tokens)
    assert sent.tokens_ND.dtype == getattr(torch, dtype) and sent.tokens_ND.tolist() == [[1.0] * 4] * 3
    with pytest.raises(InternalError, match="visual tokens: none is left"):
        encode_response(visual_tokens(torch.ones(0, 4)), delivery)


def test_a_device_that_torch_does_not_know_is_refused_by_name():
    for device in ("auto", "cpu", "cuda", "cuda:1"):
        assert build_settings(EncoderSettings, {"checkpoint": "x", "device": device}).device == device
    for device in ("gpu", "cuda:x", ""):
        with pytest.raises(InvalidInput, match=f"device: is '{device}', expected auto, cpu"):
            build_settings(EncoderSettings, {"checkpoint": "x", "device": device})
