"""The vision tower: transformers' CLIP vision model, with a convolutional stem for small models."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from services.common.errors import InvalidInput
from services.common.settings import require


class ConvStem(nn.Sequential):
    """3x3 convolutions in place of one patch convolution: learns edges from few images. Total stride = patch size.

    In fp32 torch may sum them in another order for another number of tiles: on one thread a tile's features then differ
    by about 1e-5 with its batch.
    """

    def __init__(self, width: int, patch_size: int):
        strides = _factors(patch_size)
        channels = [3] + [max(32, width // 2 ** (len(strides) - i)) for i in range(1, len(strides))] + [width]
        layers: list[nn.Module] = []
        for i, stride in enumerate(strides):
            layers += [
                nn.Conv2d(channels[i], channels[i + 1], stride + 1 + stride % 2, stride, (stride + stride % 2) // 2),
                nn.GELU(),
            ]
        layers.append(nn.Conv2d(width, width, 1))
        super().__init__(*layers)

    @property
    def weight(self) -> torch.Tensor:
        """CLIP reads its patch embedding's dtype from here."""
        return self[0].weight  # type: ignore[return-value]


def _factors(number: int) -> list[int]:
    factors, rest = [], number
    for prime in (2, 3, 5, 7):
        while rest % prime == 0:
            factors.append(prime)
            rest //= prime
    if rest != 1:
        raise InvalidInput(f"is {number}, the conv stem needs a product of 2, 3, 5 and 7", field="vision.patch_size")
    return factors


def build_vision_tower(config: CLIPVisionConfig, stem: str = "patch") -> CLIPVisionModel:
    tower = CLIPVisionModel._from_config(config, attn_implementation="sdpa")
    if stem == "conv":
        tower.embeddings.patch_embedding = ConvStem(config.hidden_size, int(config.patch_size))  # type: ignore[arg-type]
    return tower


def feature_depth(layers: int, feature_layer: int) -> int:
    """How many of `layers` run for the hidden state `feature_layer`; negative ones count from the last (-1: all run).

    Raises InvalidInput for a hidden state that there is not.
    """
    in_range = -layers - 1 <= feature_layer <= layers
    require(in_range, "vision_feature_layer", feature_layer, f"{-layers - 1} to {layers} for {layers} layers")
    return feature_layer if feature_layer >= 0 else layers + 1 + feature_layer


def patch_features(tower: CLIPVisionModel, pixels_T3HW: torch.Tensor, feature_layer: int) -> torch.Tensor:
    """Features [T, P, C] of one hidden layer (-2: the last but one), CLS dropped."""
    depth = feature_depth(len(tower.encoder.layers), feature_layer)
    hidden = tower.pre_layrnorm(tower.embeddings(pixels_T3HW))
    for layer in tower.encoder.layers[:depth]:
        # Layers past the feature layer are never run.
        hidden = layer(hidden, attention_mask=None)
    return hidden[:, 1:]
