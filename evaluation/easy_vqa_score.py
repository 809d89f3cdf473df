"""Scores of a checkpoint on easy-VQA's test split, by question kind: python -m evaluation.easy_vqa_score CHECKPOINT

The questions go through the served code (`services/local`), with every combination of the samplers.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from evaluation.score import SETTINGS, baseline_scores, score, table
from services.common.errors import InvalidInput
from services.local.model import LocalModel
from training.data.easy_vqa import EASY_VQA_KINDS, IMAGES, easy_vqa

GROUPS: dict[str, tuple[str, ...]] = {"what": ("shape", "colour"), "yes or no": ("presence", "absence")}
"""Two questions in three are answered by one of two words, so a score over all says little of what was seen."""
DIGITS = 2
"""Digits of a percentage: of 9,673 questions one is 0.01."""
COLUMNS: tuple[str, ...] = ("all", *GROUPS, *EASY_VQA_KINDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("checkpoint")
    parser.add_argument("--images", type=int, default=IMAGES["test"], help="the split's first ones; all when left out")
    parser.add_argument("--settings", default=",".join(s.name for s in SETTINGS), help="comma-separated")
    parser.add_argument("--threshold", type=float, default=None, help="gamma of Eq. 9; the checkpoint's when left out")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--json", type=pathlib.Path, help="also write the results here")
    arguments = parser.parse_args()
    wanted = arguments.settings.split(",")
    if unknown := set(wanted) - {setting.name for setting in SETTINGS}:
        parser.error(f"--settings: {', '.join(sorted(unknown))}: expected some of {[s.name for s in SETTINGS]}")
    if not 1 <= arguments.images <= IMAGES["test"]:
        parser.error(f"--images: must be 1 to {IMAGES['test']}, not {arguments.images}")
    try:
        data, training = easy_vqa("test")[: arguments.images], easy_vqa("train")
        model = LocalModel(arguments.checkpoint, "cpu", arguments.dtype)
    except InvalidInput as error:
        parser.error(str(error))
    results: dict[str, dict[str, Any]] = {}
    for setting in SETTINGS:
        if setting.name in wanted:
            results[setting.name] = score(model, data, setting, arguments.threshold, GROUPS, DIGITS)
            print(f"{setting.name}: {json.dumps(results[setting.name])}", flush=True)
    results |= baseline_scores(data, [question for _, asked in training for question in asked], GROUPS, DIGITS)
    asked = results["majority"]["questions"]["all"]
    print(f"\neasy-VQA test, {len(data)} images, {asked} questions, model {model.pipeline.fingerprint[:12]}\n")
    print(table(results, COLUMNS))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
