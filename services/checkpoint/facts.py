"""A checkpoint's facts for a person, from its small files; imports nothing heavy but to verify the weights."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

from services.common.errors import InvalidInput


def checkpoint_facts(folder: pathlib.Path, *, verify: bool = False) -> dict[str, Any]:
    """What `focusllava info` shows of a checkpoint folder; verify: with the fingerprint, its weights hashed again.

    Raises InvalidInput where there is no checkpoint, or one whose weights are not those that it was made with.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf8"))
        if config["model_type"] != "focusllava":
            raise InvalidInput(f"is a {config['model_type']!r} model, not focusllava", field=str(folder))
        text, vision_sampler, text_sampler = config["text"], config["vision_sampler"], config["text_sampler"]
        facts = {
            "name": folder.resolve().name,
            "text_family": text["model_type"],
            "num_layers": text["num_hidden_layers"],
            "hidden_size": text["hidden_size"],
            "tile_px": config["vision"]["image_size"],
            "largest_grid": "{}x{} px".format(*max(config["image_grid_pinpoints"], key=math.prod)),
            "region_window": vision_sampler["window"],
            "branches": ", ".join(f"{h}x{w}" for h, w in vision_sampler["branches"]),
            "prune_layer": text_sampler["layer"],
            "prune_threshold": text_sampler["threshold"],
            "encoder_bytes": sum(path.stat().st_size for path in folder.glob("encoder-*.safetensors")),
            "llm_bytes": sum(path.stat().st_size for path in folder.glob("llm-*.safetensors")),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"no readable FocusLLaVA checkpoint: {error!r}", field=str(folder)) from None
    if verify:
        from services.checkpoint.store import verify as verified

        facts["fingerprint"] = verified(folder)
    return facts
