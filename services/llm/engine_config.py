"""How large an engine is and what it may reuse: one object from a deployment's `args` to cache and scheduler."""

from __future__ import annotations

import dataclasses
import pathlib
import platform
from dataclasses import dataclass

import torch

from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.sizing import LlmSizes, size_encoder, size_llm
from services.checkpoint.store import stage_elements
from services.common.settings import Count, check_settings
from services.compute.linear import Quantize
from services.compute.memory import device_memory


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of `Engine`. None follows from checkpoint, device and memory (`services/checkpoint/sizing.py`)."""

    kv_cache_bytes: Count | None = None
    """Bytes for keys and values, and for the hidden states beside those that may be used again."""
    max_batch_tokens: Count | None = None
    """Tokens of one step, each counted by the share of the layers that it goes through: running answers wait no longer
    than this for a prompt that arrives. Decoding sequences may exceed it; prefill gets what they leave, a block at
    least."""
    max_running: Count | None = None
    """Most requests in work together."""
    max_model_len: Count | None = None
    """Tokens of prompt and answer together; None is the model's own context."""
    prefix_reuse: bool = True
    """Equal beginnings of prompts, images included, go through the layers before the prune layer once."""
    quantize: Quantize | None = None
    """"int8" quantises weights and inputs of the decoder's linear layers, on a CPU with AVX-512 VNNI."""

    def __post_init__(self) -> None:
        check_settings(self)

    def sizes(
        self,
        checkpoint: str | pathlib.Path,
        device: torch.device | str,
        dtype: torch.dtype,
        *,
        memory_share: float = 0.9,
        gpu_part: float = 1.0,
    ) -> LlmSizes:
        """Sizes on a device that has not loaded the model yet.

        memory_share: share of a GPU's memory, or of a machine's free memory, that may be used; gpu_part: the part of
        its GPU that is this process'. A kv_cache_bytes that is set asks nothing of the memory.
        Raises InvalidInput for a kv_cache_bytes that is None where no full image could be answered.
        """
        on_gpu, memory, budget = torch.device(device).type == "cuda", device_memory(device), None
        if self.kv_cache_bytes is None and on_gpu:  # GPU only
            budget = min(int(memory_share * gpu_part * memory.total), memory.free)
        elif self.kv_cache_bytes is None:
            config, elements = FocusLlavaConfig.load(checkpoint), stage_elements(checkpoint, "encoder")
            budget = int(memory_share * memory.free) - size_encoder(config, elements, dtype=dtype, on_gpu=False).bytes
        return self.sizes_within(budget, f"{device} of {platform.node()}", checkpoint, dtype, on_gpu=on_gpu)

    def sizes_within(
        self, budget: int | None, where: str, checkpoint: str | pathlib.Path, dtype: torch.dtype, *, on_gpu: bool
    ) -> LlmSizes:
        """Sizes that share `budget` bytes of `where` out, as `services.checkpoint.sizing.size_llm` does."""
        return size_llm(
            FocusLlavaConfig.load(checkpoint),
            stage_elements(checkpoint, "llm"),
            dtype=dtype,
            on_gpu=on_gpu,
            budget=budget,
            where=where,
            kv_cache_bytes=self.kv_cache_bytes,
            max_batch_tokens=self.max_batch_tokens,
            max_running=self.max_running,
            max_model_len=self.max_model_len,
        )

    def sized(self, sizes: LlmSizes) -> EngineConfig:
        """The same with nothing left open but max_model_len."""
        return dataclasses.replace(self, **sizes.settings)
