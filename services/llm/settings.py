"""Settings of stage 2, apart from its deployment: who builds the application needs no model."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Literal

import torch

from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.sizing import LlmSizes, size_encoder, size_llm
from services.checkpoint.store import stage_elements
from services.checkpoint.supported import check_servable
from services.common.settings import require
from services.compute.memory import device_memory
from services.compute.replica import ModelSettings


@dataclass(frozen=True, kw_only=True)
class LanguageModelSettings(ModelSettings):
    """`args` of the llm application."""

    kv_cache_bytes: int | None = None
    """Pays for keys and values, and for the hidden states beside those that may be used again. Unset, this and the two
    below follow from checkpoint, device and `memory_share` (`services/checkpoint/sizing.py`)."""
    max_batch_tokens: int | None = None
    """Tokens of one step: running answers wait no longer than this for a prompt that arrives."""
    max_running: int | None = None
    """Most requests in work together."""
    max_model_len: int | None = None
    """Tokens of prompt and answer together; unset: the model's own context."""
    prefix_reuse: bool = True
    """Equal beginnings of prompts, images included, go through the lower layers once."""
    quantize: Literal["int8"] | None = None
    """"int8" quantises weights and inputs of the decoder's linear layers, on a CPU with AVX-512 VNNI."""
    stall_s: float = 300.0
    """A replica whose requests made no progress for this long is replaced."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kv_cache_bytes", "max_batch_tokens", "max_running", "max_model_len"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "1 or more")
        require(self.stall_s >= 0, "stall_s", self.stall_s, "0 or more seconds")
        require(self.quantize in (None, "int8"), "quantize", self.quantize, '"int8" or nothing')

    def sizes(self, device: str, dtype: torch.dtype, gpu_part: float = 1.0) -> LlmSizes:
        """Sizes of a replica that is about to load; gpu_part: what it may use of its GPU.

        Raises InvalidInput for what could never answer a full image.
        """
        config, on_gpu = FocusLlavaConfig.load(self.checkpoint), torch.device(device).type == "cuda"
        check_servable(config)
        memory, budget = device_memory(device), None
        if self.kv_cache_bytes is None and on_gpu:  # GPU only
            budget = min(int(self.memory_share * gpu_part * memory.total), memory.free)
        elif self.kv_cache_bytes is None:
            encoder = size_encoder(config, stage_elements(self.checkpoint, "encoder"), dtype=dtype, on_gpu=False)
            budget = int(self.memory_share * memory.free) - encoder.bytes
        return size_llm(
            config,
            stage_elements(self.checkpoint, "llm"),
            dtype=dtype,
            on_gpu=on_gpu,
            budget=budget,
            where=f"{device} of {platform.node()}",
            kv_cache_bytes=self.kv_cache_bytes,
            max_batch_tokens=self.max_batch_tokens,
            max_running=self.max_running,
            max_model_len=self.max_model_len,
        )
