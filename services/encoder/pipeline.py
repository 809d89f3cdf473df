"""The encoder stage in reading order: bytes -> tiles -> features -> feature map -> compressed visual tokens."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.store import fingerprint, load_stage
from services.common.errors import InvalidInput
from services.common.media import MediaLimits, content_hash
from services.common.ranges import check_map_share
from services.common.types import CompressedVisualTokens, ImageOptions, ImageTiles
from services.compute.dtypes import dtype_of_stored
from services.compute.linear import onednn_multiplies
from services.encoder.anyres import any_map_left
from services.encoder.cpu_tower import prepare_encoder
from services.encoder.model import EncoderModel
from services.encoder.reading import read_tiles


@dataclass(frozen=True, kw_only=True)
class PreparedImage:
    """An image decoded and tiled, ready for the vision tower."""

    tiles: ImageTiles
    content_hash: str
    notes: tuple[str, ...]
    map_share: float | None = None
    """The largest share of its feature map's tokens to leave; None leaves the sampler its own choice."""


class EncoderPipeline:
    """One checkpoint's encoder stage on one device. `prepare` may run on many threads, `encode` on one at a time."""

    def __init__(self, model: EncoderModel, model_fingerprint: str, limits: MediaLimits | None = None):
        self.model = model.eval()
        self.config = model.config
        self.fingerprint = model_fingerprint
        self.limits = limits or MediaLimits()

    @classmethod
    def from_checkpoint(cls, folder: str | pathlib.Path, *, dtype: torch.dtype | None = None, device: str = "cpu",
                        limits: MediaLimits | None = None) -> EncoderPipeline:  # fmt: skip
        """Loads the encoder's shards only. dtype None keeps the checkpoint's where `device` is made for it."""
        config = FocusLlavaConfig.load(folder)
        dtype = dtype or dtype_of_stored(config.dtype, device)
        with torch.device("meta"):
            model = EncoderModel(config)
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        stored = load_stage(folder, "encoder", expected=expected)
        model.load_state_dict({name: tensor.to(device, dtype) for name, tensor in stored.items()}, assign=True)
        # Built on the meta device, the one non-persistent buffer has no value yet.
        embeddings = model.vision_tower.embeddings
        embeddings.register_buffer(
            "position_ids", torch.arange(embeddings.num_positions, device=device).expand((1, -1)), persistent=False
        )
        if onednn_multiplies(torch.device(device), dtype):
            prepare_encoder(model)
        return cls(model, fingerprint(folder), limits)

    def prepare(self, image: bytes, vision_sampler: bool = True, options: ImageOptions | None = None) -> PreparedImage:
        """Decodes and tiles an image file, to be encoded with or without the vision sampler.

        Raises InvalidInput or TooLarge naming what is wrong with it.
        """
        options = options or ImageOptions()
        check_map_share(options, vision_sampler, "options")
        tiles, notes = read_tiles(image, self.config, options, limits=self.limits)
        if options.detail == "high":
            notes = (*notes, *self._narrow_notes(tiles, vision_sampler))
        return PreparedImage(tiles=tiles, content_hash=content_hash(image), notes=notes, map_share=options.map_share)

    def _narrow_notes(self, tiles: ImageTiles, vision_sampler: bool) -> tuple[str, ...]:
        if any_map_left(tiles, self.config.patches_per_side):
            return ()
        sampler = self.config.vision_sampler
        if vision_sampler and sampler.enabled and sampler.base_tile == "drop":
            height, width = tiles.image_size_hw
            found = f"is {width} x {height} pixels, too narrow for this checkpoint's grid: no visual token is left"
            raise InvalidInput(found, field="image")
        return ("too narrow for the grid: only the thumbnail is seen",)

    @torch.inference_mode()
    def encode(self, images: Sequence[PreparedImage], vision_sampler: Sequence[bool]) -> list[CompressedVisualTokens]:
        """Encodes a batch; each image is sampled or not as its flag says, none when the checkpoint's sampler is off."""
        sampled = [on and self.config.vision_sampler.enabled for on in vision_sampler]
        encoded = self.model([image.tiles for image in images], sampled, [image.map_share for image in images])
        return [
            CompressedVisualTokens(
                tokens_ND=result.tokens_ND.cpu(),
                branch_ids_M=_branch_ids(result.sampled.branch_ids_M if result.sampled else None),
                map_hw=result.map_hw,
                uncompressed_tokens=result.uncompressed_tokens,
                content_hash=image.content_hash,
                model_fingerprint=self.fingerprint,
                notes=image.notes,
                image_size_hw=image.tiles.image_size_hw,
                base_branch_ids_M=_branch_ids(result.base_branch_ids_M),
            )
            for image, result in zip(images, encoded, strict=True)
        ]


def _branch_ids(chosen_M: torch.Tensor | None) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8) if chosen_M is None else chosen_M.to("cpu", torch.uint8)
