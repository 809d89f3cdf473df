"""Settings of stage 1, apart from its deployment: building the application needs no model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from services.common.media import MediaLimits
from services.common.settings import Natural, require
from services.compute.replica import ModelSettings


@dataclass(frozen=True, kw_only=True)
class EncoderSettings(ModelSettings):
    """`args` of the encoder application."""

    wire_dtype: Literal["float32", "bfloat16", "float16", "int8"] = "bfloat16"
    """The dtype that the visual tokens are sent and kept in. "int8" has a scale for each 64 values, and 0.53 of
    bfloat16's bytes: for stages on different nodes, or a cache that is to hold more images."""
    max_tiles: int | None = None
    """Most tiles in one pass of the vision tower; unset: 80 on a GPU, 20 on a CPU."""
    max_wait_s: float = 0.002
    """Longest that the first image of a batch waits for others."""
    decode_threads: int = 2
    """Threads that decode and tile images while the model runs."""
    shelf_bytes: Natural = 2**29
    """Most bytes of shared memory that a node's encoders leave visual tokens in, for the other stages there; an 8B
    model's take 24 MB an image. 0: they are always sent."""
    media: MediaLimits = field(default_factory=MediaLimits)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_tiles is None or self.max_tiles >= 1, "max_tiles", self.max_tiles, "1 or more")
        require(self.max_wait_s >= 0, "max_wait_s", self.max_wait_s, "0 or more seconds")
        require(self.decode_threads >= 1, "decode_threads", self.decode_threads, "1 or more")
