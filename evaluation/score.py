"""Scores of a checkpoint on held-out scenes, by question kind: python -m evaluation.score CHECKPOINT

The questions go through the served code, encoder pipeline and engine, with every combination of the samplers.
"""

from __future__ import annotations

import argparse
import io
import json
import pathlib
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evaluation.baselines import Baselines
from services.common.types import (
    ChatTurn,
    CompressedVisualTokens,
    FinishedEvent,
    GenerateRequest,
    ImagePart,
    PruneParams,
    SamplingParams,
    TextPart,
    Usage,
)
from services.encoder.pipeline import EncoderPipeline
from services.llm.engine import Engine
from training.data.questions import QuestionAnswer, questions
from training.data.rendering import render
from training.data.splits import Split, dataset_version, scene_at
from training.data.vocabulary import DETAIL_KINDS

HeldOut = Sequence[tuple[bytes, list[QuestionAnswer]]]
"""Image files, each with its questions."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Which samplers are on."""

    name: str
    vision: bool
    text: bool


SETTINGS = (
    Setting(name="off", vision=False, text=False),
    Setting(name="vision", vision=True, text=False),
    Setting(name="text", vision=False, text=True),
    Setting(name="both", vision=True, text=True),
)


def held_out(images: int, split: Split, seed: int) -> Iterator[tuple[bytes, list[QuestionAnswer]]]:
    """PNG files and their questions; seeds of evaluation differ from those of training as well as the scenes."""
    for index in range(images):
        scene = scene_at(split, seed, index)
        file = io.BytesIO()
        render(scene).save(file, "PNG")
        yield file.getvalue(), questions(scene, random.Random(f"{seed}/{index}/score"))


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
                prune=PruneParams(enabled=text, threshold=threshold),
            )
        )
    while engine.has_work():
        for request_id, event in engine.step():
            if isinstance(event, FinishedEvent):
                usages[request_id] = event.usage
            else:
                texts[request_id] += event.text
    return [(texts[str(n)].strip(), usages[str(n)]) for n in range(len(asked))]


def score(
    pipeline: EncoderPipeline, engine: Engine, data: HeldOut, setting: Setting, threshold: float | None = None
) -> dict[str, Any]:
    """Exact match by kind, and the visual tokens that it took."""
    right: dict[str, list[bool]] = defaultdict(list)
    converted = uncompressed = sampled = kept = 0.0
    branches = torch.zeros(3, dtype=torch.long)
    began = time.perf_counter()
    for file, asked in data:
        (tokens,) = pipeline.encode([pipeline.prepare(file)], [setting.vision])
        branches += torch.bincount(tokens.branch_ids_M.long(), minlength=3)[:3]
        for question, (text, usage) in zip(asked, answer(engine, tokens, asked, setting.text, threshold), strict=True):
            right[question.kind].append(text == question.answer)
            uncompressed += usage.visual_tokens_uncompressed
            sampled += usage.visual_tokens_sampled
            kept += usage.visual_tokens_kept
            converted += usage.converted_visual_tokens
    detail = [hit for kind in DETAIL_KINDS for hit in right[kind]]
    return {
        "exact_percent": {kind: round(100 * sum(hits) / len(hits), 1) for kind, hits in sorted(right.items())},
        "questions": {kind: len(hits) for kind, hits in sorted(right.items())},
        "detail_percent": round(100 * sum(detail) / len(detail), 1),
        "sampled_percent": round(100 * sampled / uncompressed, 1),
        "kept_percent": round(100 * kept / uncompressed, 1),
        "converted_percent": round(100 * converted / uncompressed, 1),
        "branch_shares": [round(float(x), 3) for x in branches / max(1, int(branches.sum()))],
        "seconds": round(time.perf_counter() - began, 1),
    }


def baseline_scores(data: HeldOut) -> dict[str, dict[str, Any]]:
    baselines = Baselines()
    scores: dict[str, dict[str, Any]] = {}
    for name, guess in (("majority", baselines.majority), ("question only", baselines.question_only)):
        right: dict[str, list[bool]] = defaultdict(list)
        for _, asked in data:
            for question in asked:
                right[question.kind].append(guess(question) == question.answer)
        detail = [hit for kind in DETAIL_KINDS for hit in right[kind]]
        scores[name] = {
            "exact_percent": {kind: round(100 * sum(hits) / len(hits), 1) for kind, hits in sorted(right.items())},
            "detail_percent": round(100 * sum(detail) / len(detail), 1),
        }
    return scores


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown, a row a setting."""
    kinds = sorted(next(iter(results.values()))["exact_percent"])
    lines = [
        f"| samplers | visual tokens, converted % | detail % | {' | '.join(kinds)} |",
        f"|---|---|---|{'---|' * len(kinds)}",
    ]
    for name, result in results.items():
        by_kind = " | ".join(str(result["exact_percent"][kind]) for kind in kinds)
        lines.append(f"| {name} | {result.get('converted_percent', '-')} | {result['detail_percent']} | {by_kind} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("checkpoint")
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--split", choices=("heldout", "train"), default="heldout")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--settings", default="off,vision,text,both", help="comma-separated")
    parser.add_argument("--threshold", type=float, default=None, help="gamma of Eq. 9; the checkpoint's when left out")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--json", type=pathlib.Path, help="also write the results here")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    pipeline = EncoderPipeline.from_checkpoint(arguments.checkpoint, dtype=dtype)
    engine = Engine.from_checkpoint(arguments.checkpoint, dtype=dtype, kv_cache_bytes=1 << 29)
    data = list(held_out(arguments.images, arguments.split, arguments.seed))
    results: dict[str, dict[str, Any]] = {}
    for setting in SETTINGS:
        if setting.name in arguments.settings.split(","):
            results[setting.name] = score(pipeline, engine, data, setting, arguments.threshold)
            print(f"{setting.name}: {json.dumps(results[setting.name])}", flush=True)
    results |= baseline_scores(data)
    print(
        f"\ndata {dataset_version()}, {arguments.images} {arguments.split} images, model {pipeline.fingerprint[:12]}\n"
    )
    print(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
