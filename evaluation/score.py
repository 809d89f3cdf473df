"""Scores of a checkpoint on the benchmark's images, by question kind: python -m evaluation.score CHECKPOINT

The questions go through the served code (`services/local`), with every combination of the samplers.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evaluation.baselines import Baselines
from evaluation.scenes import (
    POSTER_KINDS,
    SEEDS,
    Tally,
    benchmark_images,
    benchmark_version,
    exact_match,
    training_questions,
)
from evaluation.scenes.scoring import GROUPS
from focusllava import user
from services.common.errors import InvalidInput
from services.common.ranges import check_samplers
from services.common.types import SamplerSettings
from services.local.model import LocalModel
from services.local.stream import LocalAnswer
from training.data.questions import QuestionAnswer

COLUMNS = ("all", "fine", "coarse", *POSTER_KINDS)
HeldOut = Sequence[tuple[bytes, list[QuestionAnswer]]]
"""Image files, each with its questions."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The samplers that are on."""

    name: str
    vision: bool
    text: bool


SETTINGS = (
    Setting(name="off", vision=False, text=False),
    Setting(name="vision", vision=True, text=False),
    Setting(name="text", vision=False, text=True),
    Setting(name="both", vision=True, text=True),
)


def answers(
    model: LocalModel, file: bytes, asked: Sequence[QuestionAnswer], setting: Setting, threshold: float | None = None
) -> list[LocalAnswer]:
    """Greedy answers to all questions about one image, in one batch."""
    return model.generate(
        [[user(question.question, images=file)] for question in asked],
        max_tokens=8,
        vision_sampler=setting.vision,
        text_sampler=setting.text,
        threshold=threshold,
    )


def score(
    model: LocalModel,
    data: HeldOut,
    setting: Setting,
    threshold: float | None = None,
    groups: Mapping[str, Sequence[str]] = GROUPS,
    digits: int = 1,
) -> dict[str, Any]:
    """Exact match by kind and group of kinds in percent with so many digits, and the visual tokens that it took."""
    given: list[LocalAnswer] = []
    branches = torch.zeros(len(model.pipeline.config.vision_sampler.branches), dtype=torch.long)
    began = time.perf_counter()
    for file, asked in data:
        given += answers(model, file, asked, setting, threshold)
        (tokens,) = model.encode([file], vision_sampler=setting.vision)
        branches += torch.bincount(tokens.branch_ids_M.long(), minlength=len(branches))[: len(branches)]
    usages = [answer.usage for answer in given]
    uncompressed = sum(usage.visual_tokens_uncompressed for usage in usages)
    tallies = exact_match((q for _, asked in data for q in asked), (answer.text for answer in given), groups)
    return {
        **by_kind(tallies, digits),
        "sampled_percent": round(100 * sum(usage.visual_tokens_sampled for usage in usages) / uncompressed, 1),
        "kept_percent": round(100 * sum(usage.visual_tokens_kept for usage in usages) / uncompressed, 1),
        "converted_percent": round(100 * sum(usage.converted_visual_tokens for usage in usages) / uncompressed, 1),
        "branch_shares": [round(float(x), 3) for x in branches / max(1, int(branches.sum()))],
        "seconds": round(time.perf_counter() - began, 1),
    }


def baseline_scores(
    data: HeldOut, training: Iterable[QuestionAnswer], groups: Mapping[str, Sequence[str]] = GROUPS, digits: int = 1
) -> dict[str, dict[str, Any]]:
    """What the answers to the training split's questions are worth without looking at an image."""
    baselines = Baselines(training)
    asked = [question for _, of_image in data for question in of_image]
    guesses = {"majority": baselines.majority, "question only": baselines.question_only}
    return {name: by_kind(exact_match(asked, map(guess, asked), groups), digits) for name, guess in guesses.items()}


def by_kind(tallies: Mapping[str, Tally], digits: int) -> dict[str, Any]:
    """Percent with so many digits, and the number of questions, of each kind and group."""
    return {
        "exact_percent": {name: round(tally.percent, digits) for name, tally in tallies.items()},
        "questions": {name: tally.asked for name, tally in tallies.items()},
    }


def table(results: Mapping[str, Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    """Markdown, a row a setting; columns: kinds of question and their groups."""
    lines = [
        f"| samplers | visual tokens, converted % | {' | '.join(columns)} |",
        f"|---|---|{'---|' * len(columns)}",
    ]
    for name, result in results.items():
        by_kind = " | ".join(str(result["exact_percent"].get(kind, "-")) for kind in columns)
        lines.append(f"| {name} | {result.get('converted_percent', '-')} | {by_kind} |")
    return "\n".join(lines)


def _settings(text: str) -> list[Setting]:
    known = {setting.name: setting for setting in SETTINGS}
    for name in text.split(","):
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
    return [known[name] for name in text.split(",")]


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("checkpoint")
    parser.add_argument("--images", type=_positive, default=300)
    parser.add_argument("--split", choices=tuple(SEEDS), default="test")
    parser.add_argument("--seed", type=int, help="the split's own when left out")
    parser.add_argument("--settings", type=_settings, default="off,vision,text,both", help="comma-separated")
    parser.add_argument("--threshold", type=float, default=None, help="gamma of Eq. 9; the checkpoint's when left out")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--device", default="cpu", help='"cuda" for a GPU')
    parser.add_argument("--json", type=pathlib.Path, help="also write the results here")
    arguments = parser.parse_args()
    try:
        check_samplers(SamplerSettings(threshold=arguments.threshold))
        model = LocalModel(arguments.checkpoint, arguments.device, arguments.dtype)
    except InvalidInput as error:
        sys.exit(str(error))
    data = list(benchmark_images(arguments.split, arguments.images, arguments.seed))
    results: dict[str, dict[str, Any]] = {}
    for setting in arguments.settings:
        results[setting.name] = score(model, data, setting, arguments.threshold)
        print(f"{setting.name}: {json.dumps(results[setting.name])}", flush=True)
    results |= baseline_scores(data, training_questions())
    print(f"\nbenchmark {benchmark_version()}, {arguments.images} {arguments.split} images, "
          f"model {model.pipeline.fingerprint[:12]}\n")  # fmt: skip
    print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
