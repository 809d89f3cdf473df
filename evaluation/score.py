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
from dataclasses import dataclass, field
from typing import Any

import torch

from evaluation.baselines import Baselines
from evaluation.scenes import (
    POSTER_KINDS,
    SEEDS,
    benchmark_images,
    benchmark_version,
    exact_match,
    training_questions,
)
from evaluation.scenes.scoring import GROUPS
from focusllava import user
from focusllava.messages import Settings
from services.common.errors import InvalidInput
from services.common.ranges import check_samplers
from services.common.types import SamplerSettings
from services.local.model import LocalModel
from services.local.stream import LocalAnswer
from training.data.questions import QuestionAnswer

COLUMNS = ("all", "fine", "coarse", *POSTER_KINDS)
HeldOut = Sequence[tuple[bytes, list[QuestionAnswer]]]
"""Image files, each with its questions."""


SAMPLERS: dict[str, Settings] = {
    "off": {"vision_sampler": False, "text_sampler": False},
    "vision": {"vision_sampler": True, "text_sampler": False},
    "text": {"vision_sampler": False, "text_sampler": True},
    "both": {"vision_sampler": True, "text_sampler": True},
}
"""Settings with every combination of the samplers, by the name of those that are on."""


@dataclass(frozen=True, kw_only=True)
class Percents:
    """How scores are told."""

    groups: Mapping[str, Sequence[str]] = field(default_factory=lambda: GROUPS)
    """Name of each group of kinds of question, and the kinds in it."""
    columns: Sequence[str] = COLUMNS
    """Kinds and groups, as the table shows them."""
    digits: int = 1

    def of(self, asked: Iterable[QuestionAnswer], answers: Iterable[str]) -> dict[str, Any]:
        """Exact match in percent, and the number of questions, of each kind and group."""
        tallies = exact_match(asked, answers, self.groups)
        return {
            "exact_percent": {name: round(tally.percent, self.digits) for name, tally in tallies.items()},
            "questions": {name: tally.asked for name, tally in tallies.items()},
        }


def answers(
    model: LocalModel, file: bytes, asked: Sequence[QuestionAnswer], samplers: Settings, threshold: float | None = None
) -> list[LocalAnswer]:
    """Greedy answers to all questions about one image, in one batch."""
    conversations = [[user(question.question, images=file)] for question in asked]
    settings: Settings = {"max_tokens": 8, "threshold": threshold, **samplers}
    return model.generate(conversations, **settings)


def score(
    model: LocalModel, data: HeldOut, samplers: Settings, threshold: float | None = None, told: Percents = Percents()
) -> dict[str, Any]:
    """Exact match by kind, and the visual tokens that it took."""
    given: list[LocalAnswer] = []
    branches = torch.zeros(len(model.pipeline.config.vision_sampler.branches), dtype=torch.long)
    began = time.perf_counter()
    for file, asked in data:
        given += answers(model, file, asked, samplers, threshold)
        (tokens,) = model.encode([file], vision_sampler=samplers["vision_sampler"] is not False)
        branches += torch.bincount(tokens.branch_ids_M.long(), minlength=len(branches))[: len(branches)]
    usages = [answer.usage for answer in given]
    uncompressed = sum(usage.visual_tokens_uncompressed for usage in usages)
    return {
        **told.of((q for _, asked in data for q in asked), (answer.text for answer in given)),
        "sampled_percent": round(100 * sum(usage.visual_tokens_sampled for usage in usages) / uncompressed, 1),
        "kept_percent": round(100 * sum(usage.visual_tokens_kept for usage in usages) / uncompressed, 1),
        "converted_percent": round(100 * sum(usage.converted_visual_tokens for usage in usages) / uncompressed, 1),
        "branch_shares": [round(float(x), 3) for x in branches / max(1, int(branches.sum()))],
        "seconds": round(time.perf_counter() - began, 1),
    }


def baseline_scores(
    data: HeldOut, training: Iterable[QuestionAnswer], told: Percents = Percents()
) -> dict[str, dict[str, Any]]:
    """What the answers to the training split's questions are worth without looking at an image."""
    baselines = Baselines(training)
    asked = [question for _, of_image in data for question in of_image]
    guesses = {"majority": baselines.majority, "question only": baselines.question_only}
    return {name: told.of(asked, map(guess, asked)) for name, guess in guesses.items()}


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


def _samplers(text: str) -> dict[str, Settings]:
    for name in text.split(","):
        if name not in SAMPLERS:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(SAMPLERS)}")
    return {name: SAMPLERS[name] for name in text.split(",")}


def positive(text: str) -> int:
    """An argument's whole number, 1 or more."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The options of a command that scores a checkpoint."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--settings", type=_samplers, default=",".join(SAMPLERS), help="comma-separated")
    parser.add_argument("--threshold", type=float, help="gamma of Eq. 9; the checkpoint's when left out")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--device", default="cpu", help='"cuda" for a GPU')
    parser.add_argument("--json", type=pathlib.Path, help="also write the results here")
    return parser


def load(arguments: argparse.Namespace) -> LocalModel:
    """The model of the arguments. Ends the program where they are of no use."""
    try:
        check_samplers(SamplerSettings(threshold=arguments.threshold))
        return LocalModel(arguments.checkpoint, arguments.device, arguments.dtype)
    except InvalidInput as error:
        sys.exit(str(error))


def report(
    arguments: argparse.Namespace,
    model: LocalModel,
    data: HeldOut,
    training: Iterable[QuestionAnswer],
    title: str,
    told: Percents = Percents(),
) -> None:
    """Scores every setting of the arguments and the baselines, prints them, and writes them where that is asked for."""
    results: dict[str, dict[str, Any]] = {}
    for name, samplers in arguments.settings.items():
        results[name] = score(model, data, samplers, arguments.threshold, told)
        print(f"{name}: {json.dumps(results[name])}", flush=True)
    results |= baseline_scores(data, training, told)
    asked = results["majority"]["questions"]["all"]
    print(f"\n{title}, {len(data)} images, {asked} questions, model {model.pipeline.fingerprint[:12]}\n")
    print(table(results, told.columns))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf8")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--images", type=positive, default=300)
    parser.add_argument("--split", choices=tuple(SEEDS), default="test")
    parser.add_argument("--seed", type=int, help="the split's own when left out")
    arguments = parser.parse_args()
    model = load(arguments)
    data = list(benchmark_images(arguments.split, arguments.images, arguments.seed))
    report(arguments, model, data, training_questions(), f"benchmark {benchmark_version()}, {arguments.split} split")


if __name__ == "__main__":
    main()
