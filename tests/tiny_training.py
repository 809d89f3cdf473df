"""A joint model small enough for tests, with the run configuration that makes it."""

from services.common.settings import build_settings
from training.config import RunConfig

MODEL = {
    "vision_stem": "conv",
    "vision_feature_layer": -1,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "dtype": "float32",
    "image_grid_pinpoints": [[96 * rows, 96 * cols] for rows in (1, 2, 3) for cols in (1, 2, 3)],
    "vision": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 96,
        "patch_size": 12,
        "hidden_act": "gelu",
    },
    "text": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    },
    "vision_sampler": {"base_grid": [8, 8], "selector_input": "region", "probability_gate": "counterfactual"},
    "text_sampler": {"layer": 2, "threshold": 0.6},
}


def tiny_run(output: str, **changes) -> RunConfig:
    """A fine-tuning run; `stage` entries given are merged over the defaults."""
    stage = {
        "model": MODEL,
        "vision_sampler": True,
        "prune": {"layers": [2, 2], "thresholds": [0.6, 0.6]},
        "questions_per_image": 3,
        **changes.pop("stage", {}),
    }
    raw = {"name": "test", "steps": 4, "samples_per_worker": 2, "output": output, "stage": stage, **changes}
    return build_settings(RunConfig, raw)
