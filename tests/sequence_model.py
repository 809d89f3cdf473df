"""A small model of both stages and conversations about random images, for tests of training's memory and devices."""

from __future__ import annotations

from typing import Any

import torch

from services.checkpoint.config import FocusLlavaConfig
from services.common.settings import build_settings
from services.common.types import ImageTiles
from services.modeling.config import FocusLlavaModelConfig
from services.modeling.loss import IGNORED
from services.modeling.model import FocusLlavaForConditionalGeneration
from services.modeling.packing import TrainedSequence
from training.plan.workload import Workload, image_workload

TILE_PX = 56
CONFIG: dict[str, Any] = {
    "image_token_id": 1999,
    "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]],
    "dtype": "float32",
    "vision": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": TILE_PX,
        "patch_size": 7,
        "hidden_act": "quick_gelu",
    },
    "text": {
        "model_type": "llama",
        "vocab_size": 2000,
        "hidden_size": 96,
        "intermediate_size": 336,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    },
    "vision_sampler": {"base_grid": [8, 8], "selector_input": "region", "probability_gate": "counterfactual"},
    "text_sampler": {"layer": 2},
}


def small_config(**changes: Any) -> FocusLlavaConfig:
    """Tiles of 8 x 8 patches, 336 visual tokens for the largest image; fields given replace the configuration's own."""
    return build_settings(FocusLlavaConfig, {**CONFIG, **changes})


def small_model(config: FocusLlavaConfig, dtype: torch.dtype = torch.float32) -> FocusLlavaForConditionalGeneration:
    """The model in training mode, with a selector that uses all branches."""
    torch.manual_seed(0)
    model = FocusLlavaForConditionalGeneration(FocusLlavaModelConfig.of(config))
    torch.nn.init.normal_(model.encoder.vision_guided_sampler.selector.linear.weight, std=2)
    torch.nn.init.zeros_(model.encoder.vision_guided_sampler.selector.linear.bias)
    return model.to(dtype).train()  # type: ignore[arg-type]


def conversation(config: FocusLlavaConfig, *, images: int = 1, words: int = 150, answers: int = 80) -> TrainedSequence:
    """Random words about images of the largest size; the last `answers` are an answer."""
    ids = torch.randint(10, 1900, (images + words,))
    ids[1 : 1 + images] = config.image_token_id
    labels = torch.full_like(ids, IGNORED)
    labels[-answers:] = ids[-answers:]
    instruction = torch.zeros_like(ids, dtype=torch.bool)
    instruction[2 + images : 20 + images] = True
    side = 2 * TILE_PX
    tiles = [
        ImageTiles(pixels_T3HW=torch.randn(5, 3, TILE_PX, TILE_PX), image_size_hw=(side, side), grid_hw=(2, 2))
        for _ in range(images)
    ]
    return TrainedSequence(input_ids=ids, labels=labels, instruction=instruction, images=tuple(tiles))


def measured_workload(config: FocusLlavaConfig, metrics: dict[str, float], **tokens: int) -> Workload:
    """The workload of a step's conversations about the largest image, from what the step reports.

    tokens: `text_tokens` and `answer_tokens` of each.
    """
    layer = int(metrics.get("prune_layer", 0))
    return image_workload(
        config,
        **tokens,
        cuts=(layer, layer) if layer else None,
        vision_share=metrics["visual_tokens"] / metrics["uncompressed_tokens"],
        text_share=metrics["kept_tokens"] / metrics["visual_tokens"],
    )
