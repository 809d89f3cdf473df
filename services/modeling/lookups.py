"""What transformers looks for in a model: embeddings, and activation checkpointing under both of its names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class Lookups(PreTrainedModel):  # type: ignore[misc]
    """A model whose embeddings are its `language_model`'s."""

    language_model: Any

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def enable_input_require_grads(self) -> None:
        """Makes word embeddings require gradients; not the vision tower's, which may be frozen for its cost."""
        hook = self.get_input_embeddings().register_forward_hook(lambda _module, _args, out: out.requires_grad_(True))
        self._require_grads_hook, self._require_grads_hooks = hook, [hook]

    @property
    def _place(self) -> torch.device:
        """The device that token ids go to."""
        # Named, a weight that ZeRO-3 shards would be gathered, on this rank alone perhaps.
        return next(self.get_input_embeddings().parameters()).device

    # transformers 5.23 renames these and warns of the older names, which callers and older versions have.

    def activation_checkpointing_enable(  # type: ignore[override]
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Computes each layer's activations again in the backward pass, as transformers documents it."""
        older = getattr(super(), "_activation_checkpointing_enable", None) or super().gradient_checkpointing_enable
        older(activation_checkpointing_kwargs, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        """Keeps activations again."""
        older = getattr(super(), "_activation_checkpointing_disable", None) or super().gradient_checkpointing_disable
        older()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """`activation_checkpointing_enable` by its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """`activation_checkpointing_disable` by its older name."""
        self.activation_checkpointing_disable()
