"""A checkpoint and conversations to train it on, both very small."""

from __future__ import annotations

import dataclasses
import json
import pathlib

from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.import_llava_next import import_llava_next
from tests.serving_client import picture
from tests.tiny_checkpoints import make_hub_checkpoint


def make_conversations(folder: pathlib.Path) -> pathlib.Path:
    """Writes `imported`, an import with both samplers off, and `data.json`: eight entries, of images of several sizes,
    of two turns, of text alone. Returns the folder."""
    import_llava_next(make_hub_checkpoint(folder / "hub"), folder / "imported")
    config = FocusLlavaConfig.load(folder / "imported")
    text = dataclasses.replace(config.text_sampler, enabled=False, layer=2, threshold=0.6)
    dataclasses.replace(config, text_sampler=text).save(folder / "imported")
    entries = []
    for index, size_wh in enumerate(((56, 40), (80, 30), (90, 90), (30, 70), (64, 64), (40, 90), (90, 50))):
        (folder / f"{index}.png").write_bytes(picture(index, size_wh))
        turns = [("human", "<image>\nWhat number is on the red card?"), ("gpt", "Six" + " and ten" * index)]
        turns += [("human", "And on the blue one?"), ("gpt", "None")] * (index % 2)
        turns = [{"from": speaker, "value": words} for speaker, words in turns]
        entries.append({"image": f"{index}.png", "conversations": turns})
    entries.append(
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day to you"}]}
    )
    (folder / "data.json").write_text(json.dumps(entries))
    return folder
