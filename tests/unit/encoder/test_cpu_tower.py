"""The encoder of a CPU against the plain modules that it is made from, and against them in float64."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from services.checkpoint.config import FocusLlavaConfig
from services.common.types import ImageTiles
from services.encoder.cpu_tower import CpuLayer, prepare_encoder, quick_gelu_
from services.encoder.model import EncoderModel
from services.encoder.pipeline import EncoderPipeline
from tests.processor import ONEDNN_DTYPES, needs_bf16
from tests.tiny_checkpoints import make_random_checkpoint

TORCH_THREADS = 2
TILE_PX = 28


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("cpu_tower") / "checkpoint"
    make_random_checkpoint(path)
    return path


def model_of(folder, dtype: torch.dtype, activation: str = "quick_gelu", stem: str = "patch") -> EncoderModel:
    """Weights of a usual size, so that activations leave their linear part."""
    config = FocusLlavaConfig.load(folder)
    vision = {**config.vision, "hidden_act": activation}
    torch.manual_seed(0)
    model = EncoderModel(dataclasses.replace(config, vision=vision, vision_stem=stem))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1.5 / parameter[0].numel() ** 0.5)
    return model.to(dtype).eval().requires_grad_(False)


def features(model: EncoderModel, pixels: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.multi_modal_projector(model.patch_features(pixels))


def pixels_of(tiles: int) -> torch.Tensor:
    return torch.randn(tiles, 3, TILE_PX, TILE_PX, generator=torch.Generator().manual_seed(tiles))


@pytest.mark.parametrize("stem", ["patch", "conv"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_pytorch_tanh", "silu"])
def test_it_computes_what_the_plain_modules_do(folder, activation, stem):
    model = model_of(folder, torch.float32, activation, stem)
    plain = features(model, pixels_of(5))
    names = set(model.state_dict())
    prepare_encoder(model)
    assert all(isinstance(layer, CpuLayer) for layer in model.vision_tower.encoder.layers)
    torch.testing.assert_close(features(model, pixels_of(5)), plain, rtol=1e-4, atol=1e-4)
    assert set(model.state_dict()) < names and not any(p.requires_grad for p in model.parameters())


@needs_bf16
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_in_bf16_it_is_no_farther_from_exact_than_plain(folder, activation):
    model = model_of(folder, torch.bfloat16, activation)
    pixels = pixels_of(5).bfloat16()
    exact = features(copy.deepcopy(model).double(), pixels)
    plain = features(model, pixels)
    prepare_encoder(model)
    ours = features(model, pixels)
    assert ours.dtype == torch.bfloat16

    def error(actual: torch.Tensor) -> float:
        return float((actual.double() - exact).norm() / exact.norm())

    assert 1e-4 < error(plain) < 0.05 and error(ours) < 1.1 * error(plain)


@pytest.mark.parametrize("dtype", ONEDNN_DTYPES, ids=str)
def test_a_tile_does_not_depend_on_its_batch(folder, dtype):
    model = model_of(folder, dtype)
    prepare_encoder(model)
    pixels = pixels_of(7)
    together = features(model, pixels)
    for tile in (0, 3, 6):
        assert torch.equal(features(model, pixels[tile : tile + 1])[0], together[tile])


def test_serving_prepares_it_and_the_sampler_keeps_its_selector(folder):
    pipeline = EncoderPipeline.from_checkpoint(folder, dtype=ONEDNN_DTYPES[-1])
    linears = [name for name, module in pipeline.model.named_modules() if isinstance(module, nn.Linear)]
    assert linears == ["vision_guided_sampler.selector.linear"]
    # A dtype that oneDNN does not multiply in is served by the plain modules.
    plain = EncoderPipeline.from_checkpoint(folder, dtype=torch.float64)
    tiles = ImageTiles(pixels_T3HW=pixels_of(2), image_size_hw=(TILE_PX, TILE_PX), grid_hw=(1, 1))
    with torch.inference_mode():
        (our_map,), (plain_map,) = pipeline.model.project([tiles]), plain.model.project([tiles])
    torch.testing.assert_close(our_map.base_PD.double(), plain_map.base_PD, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quick_gelu_is_the_formula_everywhere(dtype):
    x = torch.cat((torch.linspace(-60, 60, 4001), torch.tensor([0.0, -0.0, 1e4, -1e4, 1e30, -1e30, 11.75, 11.8])))
    x = x.to(dtype)
    exact = x.double() * torch.sigmoid(1.702 * x.double())
    out = quick_gelu_(x)
    assert out.data_ptr() == x.data_ptr() and out.dtype == dtype
    # In fp32 what exp() of a rounded argument may be off by.
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-17
    torch.testing.assert_close(out.double(), exact, rtol=rounding, atol=1e-30)
