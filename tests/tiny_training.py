"""A model small enough for tests, with the run configuration that makes it, and a run on an import."""

import dataclasses
import json
import pathlib

import torch

from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.import_llava_next import import_llava_next
from services.common.settings import build_settings
from tests.serving_client import picture
from tests.tiny_checkpoints import make_hub_checkpoint
from training.config import RunConfig
from training.conversation_stage import ConversationTask

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


def train_imported(folder: pathlib.Path, *, vision: bool = True, text: bool = True) -> pathlib.Path:
    """Imports a random checkpoint with both samplers off, trains for two steps those asked for, and exports.

    Returns the export's folder. Its selector has no branch of full resolution, so a sampler that is on shows.
    """
    imported, out = folder / "imported", folder / "out"
    import_llava_next(make_hub_checkpoint(folder / "hub"), imported)
    config = FocusLlavaConfig.load(imported)
    assert not config.vision_sampler.enabled
    dataclasses.replace(config, text_sampler=dataclasses.replace(config.text_sampler, enabled=False)).save(imported)
    entries = []
    for index, size_wh in enumerate(((56, 40), (80, 30), (90, 90))):
        (folder / f"{index}.png").write_bytes(picture(index, size_wh))
        turns = [
            {"from": "human", "value": "<image>\nWhat number is on the red card?"},
            {"from": "gpt", "value": "Six"},
        ]
        entries.append({"image": f"{index}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(entries))
    stage = {
        "vision_sampler": vision,
        "prune": {"layers": [2, 2], "thresholds": [0.6, 0.6]} if text else None,
        "data": str(folder / "data.json"),
        "processes": 0,
        "max_length": 512,
        # Coarse branches are to be chosen, which a selector of two steps would not.
        "model": {"vision_sampler": {"branches": [[2, 2], [4, 4]], "balance_coefficients": [1.0, 1.0]}},
    }
    raw = {"name": "test", "steps": 2, "samples_per_worker": 2, "output": str(out), "init_from": str(imported)}
    task = ConversationTask(build_settings(RunConfig, {**raw, "stage": stage, "cluster": {"dtype": "float32"}}))
    optimizer = torch.optim.SGD([p for p in task.module.parameters() if p.requires_grad], lr=1e-3)
    for step in range(2):
        optimizer.zero_grad()
        loss, _ = task.module(task.batch(step, 0, 1), step)
        loss.backward()
        optimizer.step()
    task.export(out)
    task.close()
    return out
