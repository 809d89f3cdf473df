"""Settings of stage 2, apart from its deployment: who builds the application needs no model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.sizing import LlmSizes, check_kv_cache
from services.checkpoint.supported import check_servable
from services.common.settings import Amount, Natural
from services.compute.replica import ModelSettings
from services.llm.engine_config import EngineConfig


@dataclass(frozen=True, kw_only=True)
class LanguageModelSettings(ModelSettings, EngineConfig):
    """`args` of the llm application: a replica's and its engine's."""

    stall_s: Amount = 300.0
    """Seconds: a replica whose requests made no progress for this long is replaced."""
    shelf_bytes: Natural = 2**29
    """Most bytes of shared memory that visual tokens from other nodes are left in, so that they are sent once; the
    encoders of this node may leave as many. 0: they are sent each time."""
    gather_s: Amount = 0.05
    """Seconds: longest that a token waits for those of its answer after it, where 8 answers run or more; with fewer it
    waits less, and with one not at all. The first token of an answer never waits. 0: none does."""

    def __post_init__(self) -> None:
        ModelSettings.__post_init__(self)
        EngineConfig.__post_init__(self)

    def replica_sizes(self, device: str, dtype: torch.dtype, gpu_part: float = 1.0) -> LlmSizes:
        """Sizes of a replica that is about to load; gpu_part: what it may use of its GPU.

        Raises InvalidInput for what could never answer a full image.
        """
        config = FocusLlavaConfig.load(self.checkpoint)
        check_servable(config)
        sizes = self.sizes(self.checkpoint, device, dtype, memory_share=self.memory_share, gpu_part=gpu_part)
        check_kv_cache(config, sizes.kv_cache_bytes, sizes.full_image_tokens, sizes.full_image_bytes)
        return sizes
