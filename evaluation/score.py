"""Scores of a checkpoint on the benchmark's images, by question kind: python -m evaluation.score CHECKPOINT

The questions go through the served code, encoder pipeline and engine, with every combination of the samplers.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
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
from services.common.errors import InvalidInput
from services.common.ranges import check_samplers
from services.common.types import (
    ChatTurn,
    CompressedVisualTokens,
    FinishedEvent,
    GenerateRequest,
    ImagePart,
    SamplerSettings,
    SamplingParams,
    TextPart,
    TokenEvent,
    Usage,
)
from services.compute.dtypes import choose_dtype
from services.encoder.pipeline import EncoderPipeline
from services.llm.engine import Engine
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


def answer(engine: Engine, tokens: CompressedVisualTokens, asked: Sequence[QuestionAnswer], text: bool,
           threshold: float | None) -> list[tuple[str, Usage]]:  # fmt: skip
    """Greedy answers to all questions about one image, batched by the engine."""
    texts: dict[str, str] = {}
    usages: dict[str, Usage] = {}
    for number, question in enumerate(asked):
        words = (ImagePart(image=0), TextPart(text=question.question))
        texts[str(number)] = ""
        engine.submit(
            GenerateRequest(
                request_id=str(number),
                turns=(ChatTurn(role="user", parts=words),),
                images=(tokens,),
                sampling=SamplingParams(max_tokens=8),
                samplers=SamplerSettings(text_sampler=text, threshold=threshold),
            )
        )
    while engine.has_work():
        for request_id, event in engine.step():
            if isinstance(event, FinishedEvent):
                usages[request_id] = event.usage
            elif isinstance(event, TokenEvent):
                texts[request_id] += event.text
            else:
                raise event
    return [(texts[str(n)].strip(), usages[str(n)]) for n in range(len(asked))]


def score(
    pipeline: EncoderPipeline, engine: Engine, data: HeldOut, setting: Setting, threshold: float | None = None
) -> dict[str, Any]:
    """Exact match by kind, and the visual tokens that it took."""
    asked_all: list[QuestionAnswer] = []
    answers: list[str] = []
    converted = uncompressed = sampled = kept = 0.0
    branches = torch.zeros(len(pipeline.config.vision_sampler.branches), dtype=torch.long)
    began = time.perf_counter()
    for file, asked in data:
        (tokens,) = pipeline.encode([pipeline.prepare(file)], [setting.vision])
        branches += torch.bincount(tokens.branch_ids_M.long(), minlength=len(branches))[: len(branches)]
        asked_all += asked
        for text, usage in answer(engine, tokens, asked, setting.text, threshold):
            answers.append(text)
            uncompressed += usage.visual_tokens_uncompressed
            sampled += usage.visual_tokens_sampled
            kept += usage.visual_tokens_kept
            converted += usage.converted_visual_tokens
    return {
        **_by_kind(exact_match(asked_all, answers)),
        "sampled_percent": round(100 * sampled / uncompressed, 1),
        "kept_percent": round(100 * kept / uncompressed, 1),
        "converted_percent": round(100 * converted / uncompressed, 1),
        "branch_shares": [round(float(x), 3) for x in branches / max(1, int(branches.sum()))],
        "seconds": round(time.perf_counter() - began, 1),
    }


def baseline_scores(data: HeldOut) -> dict[str, dict[str, Any]]:
    """What can be had without looking, counted on the training split's questions."""
    baselines = Baselines(training_questions())
    asked = [question for _, of_image in data for question in of_image]
    return {
        name: _by_kind(exact_match(asked, map(guess, asked)))
        for name, guess in (("majority", baselines.majority), ("question only", baselines.question_only))
    }


def _by_kind(tallies: dict[str, Tally]) -> dict[str, Any]:
    return {
        "exact_percent": {name: round(tally.percent, 1) for name, tally in tallies.items()},
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
    dtype = choose_dtype(arguments.dtype, arguments.device)
    place: dict[str, Any] = {"dtype": dtype, "device": arguments.device}
    try:
        check_samplers(SamplerSettings(text_sampler=True, threshold=arguments.threshold))
        pipeline = EncoderPipeline.from_checkpoint(arguments.checkpoint, **place)
        engine = Engine.from_checkpoint(arguments.checkpoint, **place, kv_cache_bytes=1 << 29)
    except InvalidInput as error:
        sys.exit(str(error))
    data = list(benchmark_images(arguments.split, arguments.images, arguments.seed))
    results: dict[str, dict[str, Any]] = {}
    for setting in arguments.settings:
        results[setting.name] = score(pipeline, engine, data, setting, arguments.threshold)
        print(f"{setting.name}: {json.dumps(results[setting.name])}", flush=True)
    results |= baseline_scores(data)
    print(f"\nbenchmark {benchmark_version()}, {arguments.images} {arguments.split} images, "
          f"model {pipeline.fingerprint[:12]}\n")  # fmt: skip
    print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
