"""The encoder stage's weights and its forward pass, for serving and training alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from services.checkpoint.config import FocusLlavaConfig
from services.common.types import ImageTiles, ProjectedFeatureMap
from services.encoder.anyres import join_tiles
from services.encoder.projector import Projector
from services.encoder.vision_tower import build_vision_tower, patch_features
from services.sampler.calibration import Seen, finer_for_share
from services.sampler.vision_guided import Choice, SampledMap, VisionGuidedSampler


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """Visual tokens of one image and, when it was sampled, what the sampler chose."""

    tokens_ND: torch.Tensor
    map_hw: tuple[int, int]
    uncompressed_tokens: int
    sampled: SampledMap | None
    base_branch_ids_M: torch.Tensor | None = None
    """int64: the branch that each region of the base tile chose; None where the tile is kept or dropped."""
    map_tokens: int = 0
    """Tokens that came out of the feature map, newlines not counted."""


class EncoderModel(nn.Module):
    """Vision tower, projector, newline embedding and vision-guided sampler."""

    def __init__(self, config: FocusLlavaConfig):
        super().__init__()
        vision, width = config.vision_config, config.text_config.hidden_size
        self.config = config
        self.vision_tower = build_vision_tower(vision, config.vision_stem)
        self.multi_modal_projector = Projector(vision.hidden_size, width, bias=config.projector_bias)
        self.image_newline = nn.Parameter(torch.randn(width) / width**0.5)
        self.vision_guided_sampler = VisionGuidedSampler(
            width, config.patches_per_side**2, **config.vision_sampler.module_options()
        )

    def patch_features(self, pixels_T3HW: torch.Tensor) -> torch.Tensor:
        """The vision tower's features [T, P, C], before the projector."""
        pixels = pixels_T3HW.to(self.image_newline.device, self.image_newline.dtype)
        return patch_features(self.vision_tower, pixels, self.config.vision_feature_layer)

    def project(self, images: Sequence[ImageTiles]) -> list[ProjectedFeatureMap]:
        """Runs the tiles of all images through tower and projector in one batch."""
        features = self.patch_features(torch.cat([image.pixels_T3HW for image in images]))
        tiles = [len(image.pixels_T3HW) for image in images]
        maps = []
        for image, projected in zip(images, self.multi_modal_projector(features).split(tiles), strict=True):
            joined = join_tiles(projected[1:], image.grid_hw, image.image_size_hw)
            maps.append(ProjectedFeatureMap(base_PD=projected[0], map_HWD=joined))
        return maps

    def tokens(
        self,
        feature_map: ProjectedFeatureMap,
        vision_sampler: bool,
        choose: Choice | None = None,
        *,
        finer: float = 0.0,
        logits_MK: torch.Tensor | None = None,
    ) -> EncodedImage:
        """Feature map to visual tokens: base tile, then rows of regions (or of the map) closed by newlines.

        With low detail: the base tile and one newline, as Hugging Face lays out a single tile. Where the checkpoint
        samples or drops its base tile, the tile is sampled as if it were a map, which is all that the model has seen.

        `choose` takes the selector's place on the map, in experiments; `finer` moves it towards detail, in training;
        `logits_MK` are its own on the map, where they were computed before.
        """
        base_PD, map_HWD = feature_map.base_PD, feature_map.map_HWD
        height, width, depth = map_HWD.shape
        mode = self.config.vision_sampler.base_tile if vision_sampler else "keep"
        sampled = base = None
        if feature_map.low_detail:
            rest_ND, newlines = self.image_newline.to(base_PD.dtype)[None], 1
            if mode != "keep":
                base = self._sampled_base(base_PD, finer)
                base_PD, rest_ND, newlines = base.tokens_ND, rest_ND[:0], 0
        elif vision_sampler:
            # With logits no weight is read: ZeRO-3, which counts calls of modules, may not see one an image.
            sampler = self.vision_guided_sampler if logits_MK is None else self.vision_guided_sampler.forward
            sampled = sampler(map_HWD, base_PD, self.image_newline, choose, finer=finer, logits_MK=logits_MK)
            rest_ND = sampled.tokens_ND
            newlines = sampled.newlines
            if mode == "sample":
                base = self._sampled_base(base_PD, finer)
                base_PD = base.tokens_ND
            elif mode == "drop":
                base_PD = base_PD[:0]
        else:
            newline = self.image_newline.to(map_HWD.dtype).expand(height, 1, depth)
            rest_ND = torch.cat((map_HWD, newline), dim=1).flatten(0, 1)
            newlines = height
        return EncodedImage(
            tokens_ND=torch.cat((base_PD, rest_ND)),
            map_hw=(height, width),
            map_tokens=len(rest_ND) - newlines,
            uncompressed_tokens=feature_map.base_PD.shape[0] + (height * (width + 1) or int(feature_map.low_detail)),
            sampled=sampled,
            base_branch_ids_M=base.branch_ids_M if base else None,
        )

    def _sampled_base(self, base_PD: torch.Tensor, finer: float) -> SampledMap:
        side = self.config.patches_per_side
        map_HWD = base_PD.view(side, side, base_PD.shape[1])
        return self.vision_guided_sampler(map_HWD, base_PD, self.image_newline, finer=finer)

    @torch.no_grad()
    def seen(self, maps: Sequence[ProjectedFeatureMap]) -> list[Seen]:
        """The vision-guided sampler's logits for each map, and its size, for `services.sampler.calibration`."""
        encoded = [self.tokens(feature_map, True) for feature_map in maps]
        return [(image.sampled.logits_MK, image.map_hw) for image in encoded if image.sampled]

    def tokens_within(self, feature_map: ProjectedFeatureMap, map_share: float) -> EncodedImage:
        """Sampled visual tokens, at most this share of the map's: the regions that need detail least are coarsened.

        No region is ever finer than the sampler's own choice. Where even the coarsest branch everywhere leaves more, it
        is that.
        """
        encoded = self.tokens(feature_map, True)
        height, width = encoded.map_hw
        if encoded.sampled is None or encoded.map_tokens <= map_share * height * width:
            return encoded
        logits_MK = encoded.sampled.logits_MK
        finer = finer_for_share(self.vision_guided_sampler, [(logits_MK, encoded.map_hw)], map_share)
        return self.tokens(feature_map, True, finer=finer, logits_MK=logits_MK)

    def forward(
        self,
        images: Sequence[ImageTiles],
        vision_sampler: Sequence[bool],
        map_shares: Sequence[float | None] | None = None,
    ) -> list[EncodedImage]:
        """Visual tokens of each image, sampled or not. `map_shares` bound what is left of each map; None does not."""
        shares = [None] * len(images) if map_shares is None else map_shares
        return [
            self.tokens(feature_map, on) if share is None or not on else self.tokens_within(feature_map, share)
            for feature_map, on, share in zip(self.project(images), vision_sampler, shares, strict=True)
        ]
