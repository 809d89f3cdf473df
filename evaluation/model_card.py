"""Writes a checkpoint's model card from its scores: python -m evaluation.model_card CHECKPOINT SCORES.json"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from evaluation.scenes import benchmark_version
from evaluation.score import table
from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.store import fingerprint, load_stage

TEMPLATE = """\
---
license: apache-2.0
---
# {name}

A FocusLLaVA of {parameters:.1f} M parameters, trained from nothing on two CPU cores, so that the whole system runs on
a laptop. It answers short English questions about generated posters: coloured cards (two-digit numbers and words in
small glyphs), shapes, keypads, bar charts and tables on large, mostly empty canvases. It knows nothing of
photographs: use it to try the system, not for its answers.

Fingerprint `{fingerprint}`.

## Scores

Exact match in percent on {images} images of the benchmark's test split ({asked} questions; version `{version}`),
greedy. "fine" needs small glyphs or a bar's few pixels to be read (number, word, card_colour, key, key_colour, bar,
cell, row), "coarse" does not. Converted visual tokens are those of Sec. 4.4 of the paper. "majority" is the commonest
answer of the kind, "question only" the best guess from the question's words; both are counted on the questions of 4,000
training images.

{table}

With both samplers on the vision-guided sampler's branches are used for {branches} of the regions (1x1, 2x2, 4x4).

`python -m evaluation.score checkpoints/{name} --images {images}` prints this table. Another
processor rounds otherwise, and a few answers differ.

## How it was trained

`docs/training.md` has the commands.

{notes}

A grounding loss (`training/experiments/grounding.py`) is used in the first stage: it is not in the paper, whose models
ground words before they meet the samplers. All splits use the same words, numbers and phrasings.
"""


def card(folder: pathlib.Path, scores: dict[str, Any], images: int, notes: str) -> str:
    encoder, llm = load_stage(folder, "encoder"), load_stage(folder, "llm")
    best = scores.get("both") or next(iter(scores.values()))
    return TEMPLATE.format(
        name=folder.name,
        parameters=sum(t.numel() for t in (*encoder.values(), *llm.values())) / 1e6,
        fingerprint=fingerprint(folder),
        images=images,
        asked=best["questions"]["all"],
        version=benchmark_version(),
        table=table(scores),
        branches=", ".join(f"{100 * share:.0f} %" for share in best["branch_shares"]),
        notes=notes.strip(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("scores", type=pathlib.Path, help="what `evaluation.score --json` wrote")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--notes", type=pathlib.Path, help="Markdown on this training: minutes, machine, limits")
    arguments = parser.parse_args()
    FocusLlavaConfig.load(arguments.checkpoint)
    scores = json.loads(arguments.scores.read_text(encoding="utf8"))
    notes = arguments.notes.read_text(encoding="utf8") if arguments.notes else ""
    text = card(arguments.checkpoint, scores, arguments.images, notes)
    (arguments.checkpoint / "README.md").write_text(text, encoding="utf8")


if __name__ == "__main__":
    main()
