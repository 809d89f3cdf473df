"""Rivals of both samplers in the model: the encoder's stage with one, and one's cuts between the LLM's layers.

Legend: T tiles, P patches, G heads, d head width, S tokens of a packed row, A asking tokens, N visual tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import CLIPVisionModel

from services.common.types import ImageTiles
from services.encoder.anyres import join_tiles
from services.encoder.model import EncodedImage, EncoderModel
from services.encoder.vision_tower import feature_depth
from services.modeling.packing import Packed
from training.experiments.rivals.base import MapRival, RivalInput
from training.experiments.rivals.layers import LayerRival, asking_tokens, keep_stage
from training.experiments.rivals.tower import Source, attention_received


@dataclass(frozen=True, kw_only=True)
class RivalCut:
    """A rival inside the language model, as a pass of the model takes it (`services.modeling.pruning.Cut`)."""

    rival: LayerRival

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(layer for layer, _ in self.rival.stages)

    def asking(self, packed: Packed) -> torch.Tensor:
        return asking_tokens(self.rival.asks, packed)

    def keep(self, layer: int, branch: int, entered: int, query_AHd: torch.Tensor, key_NGd: torch.Tensor,
             scaling: float) -> torch.Tensor:  # fmt: skip
        return keep_stage(self.rival.importance(query_AHd, key_NGd, scaling), dict(self.rival.stages)[layer], entered)


def encode_with_rival(encoder: EncoderModel, images: Sequence[ImageTiles], rival: MapRival) -> list[EncodedImage]:
    """The encoder's forward pass with a rival where the vision-guided sampler would run."""
    config, newline_D = encoder.config, encoder.image_newline
    pixels = torch.cat([image.pixels_T3HW for image in images]).to(newline_D.device, newline_D.dtype)
    source: Source = getattr(rival, "source", "cls")  # most rivals read no attention
    features, attention_TP, key_TPGd = _features_and_cues(
        encoder.vision_tower, pixels, config.vision_feature_layer, source
    )
    tiles = [len(image.pixels_T3HW) for image in images]
    parts = (encoder.multi_modal_projector(features), attention_TP.unsqueeze(-1), key_TPGd.flatten(2))
    encoded = []
    for image, *of_tiles in zip(images, *(part.split(tiles) for part in parts), strict=True):
        base_PD = of_tiles[0][0]
        grid, size = image.grid_hw, image.image_size_hw
        map_HWD, attention_HW1, key_HWC = (join_tiles(part[1:], grid, size) for part in of_tiles)
        reduced = rival(
            RivalInput(
                map_HWD=map_HWD,
                base_ND=base_PD,
                newline_D=newline_D,
                attention_HW=attention_HW1.squeeze(-1),
                key_HWGd=key_HWC.unflatten(-1, key_TPGd.shape[2:]),
                content_hash=hashlib.sha256(image.pixels_T3HW.contiguous().cpu().numpy().tobytes()).hexdigest(),
            )
        )
        height, width, _ = map_HWD.shape
        uncompressed = len(base_PD) + height * (width + 1)
        base_PD = base_PD[:0] if config.vision_sampler.base_tile == "drop" else base_PD
        tokens_ND = torch.cat((base_PD, reduced.tokens_SD))
        encoded.append(
            EncodedImage(
                tokens_ND=tokens_ND,
                map_hw=(height, width),
                map_tokens=reduced.content_tokens,
                uncompressed_tokens=uncompressed,
                sampled=None,
            )
        )
    return encoded


def _features_and_cues(
    tower: CLIPVisionModel, pixels_T3HW: torch.Tensor, feature_layer: int, source: Source
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`patch_features`, and of the last layer that runs the attention received [T, P] and the keys [T, P, G, d]."""
    layers = tower.encoder.layers
    depth = feature_depth(len(layers), feature_layer)
    hidden = tower.pre_layrnorm(tower.embeddings(pixels_T3HW))
    for layer in layers[: depth - 1]:
        hidden = layer(hidden, attention_mask=None)
    last = layers[depth - 1]
    with torch.no_grad():
        normed, heads = last.layer_norm1(hidden), (-1, last.self_attn.head_dim)
        query_TPGd = last.self_attn.q_proj(normed).unflatten(-1, heads)
        key_TPGd = last.self_attn.k_proj(normed).unflatten(-1, heads)
    received = attention_received(query_TPGd, key_TPGd, last.self_attn.scale, source)
    return last(hidden, attention_mask=None)[:, 1:], received, key_TPGd[:, 1:]
