"""The checkpoint's configuration as transformers passes it around: `config.json` read and written as serving has it."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PreTrainedConfig

from services.checkpoint.config import FORMAT_VERSION, MODEL_TYPE, FocusLlavaConfig

_OURS = frozenset(field.name for field in dataclasses.fields(FocusLlavaConfig))


class FocusLlavaModelConfig(PreTrainedConfig):
    """A `FocusLlavaConfig` (`checkpoint`) with what transformers wants beside it.

    Its arguments are the fields of `config.json`. `text_config` is the decoder's own configuration; a vocabulary that
    is resized there is saved. Raises InvalidInput as `FocusLlavaConfig.from_dict`.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values", "metrics"]  # Trainer's evaluation gathers the rest

    def __init__(self, **fields: Any):
        ours = {name: fields.pop(name) for name in _OURS & fields.keys()}
        version = fields.pop("format_version", FORMAT_VERSION)
        fields.pop("model_type", None)
        if ours.get("dtype") is not None:
            ours["dtype"] = str(ours["dtype"]).removeprefix("torch.")
        self.checkpoint = FocusLlavaConfig.from_dict({"model_type": MODEL_TYPE, "format_version": version, **ours})
        self.text_config = self.checkpoint.text_config
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        self.image_token_id = self.checkpoint.image_token_id
        super().__init__(dtype=self.checkpoint.dtype, **fields)

    @classmethod
    def of(cls, checkpoint: FocusLlavaConfig) -> FocusLlavaModelConfig:
        """The same configuration for transformers."""
        return cls(**checkpoint.to_dict())

    def saved(self) -> FocusLlavaConfig:
        """What `config.json` says of this model now, its dtype and vocabulary included."""
        text, vocabulary = self.checkpoint.text, self.text_config.vocab_size
        if vocabulary != self.checkpoint.text_config.vocab_size:
            text = {**text, "vocab_size": vocabulary}
        dtype: Any = str(self.dtype or self.checkpoint.dtype).removeprefix("torch.")
        return dataclasses.replace(self.checkpoint, text=text, dtype=dtype)

    def to_dict(self) -> dict[str, Any]:
        """The fields of `config.json`."""
        return self.saved().to_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        """All the fields: `config.json` leaves none out."""
        return self.to_dict()
