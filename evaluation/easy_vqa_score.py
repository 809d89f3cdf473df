"""Scores of a checkpoint on easy-VQA's test split, by question kind: python -m evaluation.easy_vqa_score CHECKPOINT

The questions go through the served code, encoder pipeline and engine, with every combination of the samplers.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from evaluation.baselines import Baselines
from evaluation.scenes.scoring import Tally, exact_match
from evaluation.score import SETTINGS, HeldOut, Setting, answer, table
from services.common.errors import InvalidInput
from services.common.types import Usage
from services.compute.dtypes import choose_dtype
from services.encoder.pipeline import EncoderPipeline
from services.llm.engine import Engine
from training.data.easy_vqa import EASY_VQA_KINDS, IMAGES, easy_vqa

GROUPS: dict[str, tuple[str, ...]] = {"what": ("shape", "colour"), "yes or no": ("presence", "absence")}
"""Two questions in three are answered by one of two words, so a score over all says little of what was seen."""
COLUMNS: tuple[str, ...] = ("all", *GROUPS, *EASY_VQA_KINDS)


def score(
    pipeline: EncoderPipeline, engine: Engine, data: HeldOut, setting: Setting, threshold: float | None = None
) -> dict[str, Any]:
    """Exact match of greedy answers by kind, and the shares of visual tokens that they took."""
    answers: list[str] = []
    usages: list[Usage] = []
    began = time.perf_counter()
    for file, asked in data:
        (tokens,) = pipeline.encode([pipeline.prepare(file)], [setting.vision])
        for text, usage in answer(engine, tokens, asked, setting.text, threshold):
            answers.append(text)
            usages.append(usage)
    whole = sum(usage.visual_tokens_uncompressed for usage in usages)
    return {
        **_percents(exact_match((q for _, asked in data for q in asked), answers, GROUPS)),
        "sampled_percent": round(100 * sum(usage.visual_tokens_sampled for usage in usages) / whole, 1),
        "kept_percent": round(100 * sum(usage.visual_tokens_kept for usage in usages) / whole, 1),
        "converted_percent": round(100 * sum(usage.converted_visual_tokens for usage in usages) / whole, 1),
        "seconds": round(time.perf_counter() - began, 1),
    }


def baseline_scores(data: HeldOut, training: HeldOut) -> dict[str, dict[str, Any]]:
    """What the answers to training questions are worth without looking at an image."""
    baselines = Baselines(question for _, asked in training for question in asked)
    asked = [question for _, of_image in data for question in of_image]
    guesses = {"majority": baselines.majority, "question only": baselines.question_only}
    return {name: _percents(exact_match(asked, map(guess, asked), GROUPS)) for name, guess in guesses.items()}


def _percents(tallies: Mapping[str, Tally]) -> dict[str, Any]:
    return {
        # Two digits: of 9,673 questions one is 0.01.
        "exact_percent": {name: round(tally.percent, 2) for name, tally in tallies.items()},
        "questions": {name: tally.asked for name, tally in tallies.items()},
    }


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
    except InvalidInput as error:
        parser.error(str(error))
    dtype = choose_dtype(arguments.dtype, "cpu")
    pipeline = EncoderPipeline.from_checkpoint(arguments.checkpoint, dtype=dtype)
    engine = Engine.from_checkpoint(arguments.checkpoint, dtype=dtype, kv_cache_bytes=1 << 28)
    results: dict[str, dict[str, Any]] = {}
    for setting in SETTINGS:
        if setting.name in wanted:
            results[setting.name] = score(pipeline, engine, data, setting, arguments.threshold)
            print(f"{setting.name}: {json.dumps(results[setting.name])}", flush=True)
    results |= baseline_scores(data, training)
    asked = results["majority"]["questions"]["all"]
    print(f"\neasy-VQA test, {len(data)} images, {asked} questions, model {pipeline.fingerprint[:12]}\n")
    print(table(results, COLUMNS))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
