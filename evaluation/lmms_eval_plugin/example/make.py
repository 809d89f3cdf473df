"""Draws the example's images and questions anew: python -m evaluation.lmms_eval_plugin.example.make"""

from __future__ import annotations

import json
import pathlib
import random

from training.data.questions import questions
from training.data.rendering import render
from training.data.splits import scene_at

FOLDER = pathlib.Path(__file__).parent
SEED, IMAGES = 2000, 6
"""Held-out scenes of a seed that no training and no other evaluation draws."""


def main(folder: pathlib.Path = FOLDER) -> None:
    lines = []
    for index in range(IMAGES):
        scene = scene_at("heldout", SEED, index)
        name = f"scene{index}.png"
        render(scene).save(folder / name, optimize=True)
        for asked in questions(scene, random.Random(f"{SEED}/{index}")):
            row = {"image": name, "kind": asked.kind, "question": asked.question, "answer": asked.answer}
            lines.append(json.dumps(row) + "\n")
    (folder / "questions.jsonl").write_text("".join(lines), encoding="utf8")


if __name__ == "__main__":
    main()
