"""Floating-point operations of a training step, from shapes alone, and the hours that they take.

A multiply-add counts as two. A linear layer's backward pass takes as many for the gradient of its input, and as many
again for that of its weight where it learns.

Legend: T tiles, N tokens, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.supported import head_width
from services.encoder.vision_tower import feature_depth
from training.plan.parameters import Trained, linear_shapes
from training.plan.workload import Workload

PEAK: Mapping[str, float] = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
"""Dense bf16 operations a second that NVIDIA names for its GPUs (SXM)."""


TOWER_AGAIN = 2 / 3
"""The share of a tower's layer that checkpointing computes again: its last product, a third, is not needed."""


@dataclass(frozen=True, kw_only=True)
class Operations:
    """Operations of one sample: by part, forward, backward, and recomputed."""

    vision_tower: float
    projector: float
    language_model: float
    head: float
    backward: float
    recomputed: float

    @property
    def forward(self) -> float:
        return self.vision_tower + self.projector + self.language_model + self.head

    @property
    def model(self) -> float:
        """What the mathematics asks for: model FLOPs utilisation counts these."""
        return self.forward + self.backward

    @property
    def total(self) -> float:
        return self.model + self.recomputed


def sample_operations(model: FocusLlavaConfig, trained: Trained, work: Workload, *, checkpointing: bool) -> Operations:
    """Operations of one sample, the mean over the layers that may be drawn."""
    text = model.text_config
    tower, projector = _tower(model, work), _projector(model, work)
    draws = work.draws(text.num_hidden_layers)
    linear = sum(map(sum, draws)) / len(draws) * 2 * sum(a * b for a, b in linear_shapes(model).values())
    attention = sum(_attention(model, tokens_L) for tokens_L in draws) / len(draws)
    decoder = linear + attention
    shapes = linear_shapes(model)
    inputs, outputs = shapes["down_proj"]
    again = decoder - linear * inputs * outputs / sum(a * b for a, b in shapes.values())
    head = 2.0 * text.vocab_size * text.hidden_size * work.answer_tokens
    every, below = trained.language_model, trained.anything_below
    # Adapters are a thousandth of the layers that they stand beside, and are left out.
    backward = (
        tower * 2 * trained.vision_tower
        + projector * (trained.vision_tower + trained.projector)
        + (linear + head) * (below + every)
        + attention * 2 * below
    )
    return Operations(
        vision_tower=tower,
        projector=projector,
        language_model=decoder,
        head=head,
        backward=backward,
        # The head's chunks are computed again whatever the setting; of a layer all but its last product.
        recomputed=head * below + checkpointing * (again * below + tower * TOWER_AGAIN * trained.vision_tower),
    )


def _attention(model: FocusLlavaConfig, tokens_L: list[int]) -> float:
    """Causal attention's forward pass: of its square, half is computed."""
    queries = model.text_config.num_attention_heads * head_width(model.text_config)
    return float(sum(2 * queries * tokens**2 for tokens in tokens_L))


def _tower(model: FocusLlavaConfig, work: Workload) -> float:
    vision = model.vision_config
    outer, inner = int(vision.hidden_size), int(vision.intermediate_size)
    layers = feature_depth(vision.num_hidden_layers, model.vision_feature_layer)
    tokens = model.patches_per_side**2 + 1
    a_layer = tokens * 2 * (4 * outer**2 + 2 * outer * inner) + 4 * outer * tokens**2
    stem = 2 * 3 * model.tile_px**2 * outer
    return float(work.tiles * (layers * a_layer + stem))


def _projector(model: FocusLlavaConfig, work: Workload) -> float:
    outer, width = int(model.vision_config.hidden_size), model.text_config.hidden_size
    return float(work.tiles * model.patches_per_side**2 * 2 * (outer * width + width**2))


def hours(operations: Operations, *, samples: int, devices: int, peak: float, utilisation: float) -> float:
    """Hours of so many samples on so many devices that reach `utilisation` of their peak in all that they compute."""
    return operations.total * samples / (devices * peak * utilisation) / 3600
