"""The parts of `generate` that this model does its own way: its cache, its images, what ends an answer.

Legend: B sequences, C columns of a padded batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin

_Mixin: Any = GenerationMixin


class PrunedGeneration(_Mixin):
    """transformers' generation for a model whose first pass makes the cache and prunes."""

    config: Any

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """Takes over a folder's generation_config.json; our checkpoints have what ends an answer in config.json."""
        super().adjust_generation_fn(*args, **kwargs)
        self._end_answers()

    def _end_answers(self) -> None:
        """Has a token of the checkpoint's end an answer, and another pad, where nothing else is said."""
        defaults, checkpoint = self.generation_config, self.config.checkpoint
        if defaults.eos_token_id is None:
            defaults.eos_token_id = list(checkpoint.eos_token_ids) or None
        if defaults.pad_token_id is None:
            defaults.pad_token_id = self.config.text_config.pad_token_id

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # The first pass makes the cache.
        return False

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, next_sequence_length: int | None = None,
                                      past_key_values: Any = None, attention_mask: torch.Tensor | None = None,
                                      **kwargs: Any) -> dict[str, Any]:  # fmt: skip
        """The prompt, then the last token alone."""
        inputs = {"attention_mask": attention_mask, "past_key_values": past_key_values, **kwargs}
        inputs["use_cache"] = kwargs.get("use_cache", True) is not False
        inputs["input_ids"] = input_ids if next_sequence_length is None else input_ids[:, -next_sequence_length:]
        if past_key_values is None and (mask := inputs.get("instruction_mask")) is not None:
            # Without a cache the answer so far is a part of the prompt, and never asks.
            inputs["instruction_mask"] = nn.functional.pad(mask, (0, input_ids.shape[1] - mask.shape[1]))
        return {name: value for name, value in inputs.items() if name not in ("labels", "position_ids")}

    def _expand_inputs_for_generation(self, expand_size: int = 1, is_encoder_decoder: bool = False,
                                      input_ids: torch.Tensor | None = None, **model_kwargs: Any
                                      ) -> tuple[torch.Tensor | None, dict[str, Any]]:  # fmt: skip
        """Repeats each sequence together with its images."""
        images: dict[str, torch.Tensor] = {}
        if expand_size > 1 and input_ids is not None and model_kwargs.get("pixel_values") is not None:
            per_row = (input_ids == self.config.image_token_id).sum(1).tolist()
            for name in ("pixel_values", "image_sizes"):
                rows = model_kwargs.pop(name).split(per_row)
                images[name] = torch.cat([row for row in rows for _ in range(expand_size)])
        ids, expanded = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return ids, {**expanded, **images}
