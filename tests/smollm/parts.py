"""What `focusllava assemble` takes: SmolLM2-135M-Instruct and a small CLIP of random weights, as hub folders.

    python -m tests.smollm.parts FOLDER

FOLDER then holds `text` and `vision`.
"""

from __future__ import annotations

import json
import pathlib
import sys

import torch
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

from tests.smollm.checkpoint import load_text_model

TILE_PX, PATCH_PX = 112, 14
"""A ninth of CLIP's tile, for two cores: an image is 336 visual tokens at most."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def save_parts(folder: pathlib.Path) -> None:
    """Writes both folders as transformers does."""
    model, tokenizer = load_text_model()
    del model.config.quantization_config
    # transformers does not save a model that was read from GGUF.
    plain = AutoModelForCausalLM.from_config(model.config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=TILE_PX,
        patch_size=PATCH_PX, projection_dim=64,
    )  # fmt: skip
    CLIPVisionModel(vision).save_pretrained(folder / "vision")
    pixels = {"image_mean": MEAN, "image_std": STD, "size": {"shortest_edge": TILE_PX}}
    (folder / "vision" / "preprocessor_config.json").write_text(json.dumps(pixels))


if __name__ == "__main__":
    save_parts(pathlib.Path(sys.argv[1]))
