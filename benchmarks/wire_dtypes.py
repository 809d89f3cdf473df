"""What the dtype of visual tokens on the wire costs and saves: bytes an image, error of the values, answers.

Questions of the benchmark's test images go through the encoder, its edge, the LLM stage's edge and the engine, which
computes in float32, once for each `wire_dtype`; no network lies between.

    python -m benchmarks.wire_dtypes checkpoints/focusllava-tiny --images 60
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.measure import RESULTS, machine, print_table, write_results
from evaluation.scenes import benchmark_images, exact_match
from services.common import wire
from services.common.types import (
    CompressedVisualTokens,
    FinishedEvent,
    GenerateRequest,
    ImagePart,
    PromptTurn,
    SamplingParams,
    TextPart,
    TokenEvent,
)
from services.encoder.deployment import Delivery, encode_response
from services.llm.engine import Engine
from services.local.model import LocalModel
from training.data.questions import QuestionAnswer

DTYPES = ("float32", "bfloat16", "float16", "int8")


@dataclass(kw_only=True)
class Crossed:
    """What one dtype did."""

    asked: list[QuestionAnswer] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    sent_bytes: int = 0
    squared_error: float = 0.0
    squared: float = 0.0


def crossed(tokens: CompressedVisualTokens, dtype: torch.dtype) -> tuple[CompressedVisualTokens, int]:
    """The tokens as the LLM stage reads them, and the bytes of their tensor."""
    message = encode_response(tokens, Delivery(dtype=dtype)).visual_tokens
    return wire.tokens_from_proto(message), len(message.tokens.data)


def answers(engine: Engine, image: CompressedVisualTokens, questions: Sequence[str]) -> list[str]:
    """Greedy answers to all questions about one image, in one batch."""
    for number, question in enumerate(questions):
        turn = PromptTurn(role="user", parts=(ImagePart(image=0), TextPart(text=question)))
        sampling = SamplingParams(max_tokens=8, temperature=0.0)
        engine.submit(GenerateRequest(request_id=str(number), turns=(turn,), images=(image,), sampling=sampling))
    texts = [""] * len(questions)
    while engine.has_work():
        for name, event in engine.step():
            assert isinstance(event, TokenEvent | FinishedEvent), event
            if isinstance(event, TokenEvent):
                texts[int(name)] += event.text
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "wire_dtypes.json")
    options = parser.parse_args()
    model = LocalModel(options.checkpoint, dtype="float32")
    found = {name: Crossed() for name in DTYPES}
    for file, questions in benchmark_images(options.split, options.images):
        (tokens,) = model.encode([file])
        for name, one in found.items():
            image, sent = crossed(tokens, getattr(torch, name))
            values_ND = image.values_ND(torch.float32)
            one.sent_bytes += sent
            one.squared_error += float((values_ND - tokens.tokens_ND).square().sum())
            one.squared += float(tokens.tokens_ND.square().sum())
            one.asked += questions
            one.answers += answers(model.engine, image, [question.question for question in questions])
    model.close()
    rows = {
        name: {
            "kilobytes_an_image": one.sent_bytes / options.images / 1e3,
            "relative_error_percent": 100 * (one.squared_error / one.squared) ** 0.5,
            "exact_percent": exact_match(one.asked, one.answers)["all"].percent,
            "as_float32_percent": 100
            * sum(a == b for a, b in zip(one.answers, found["float32"].answers, strict=True))
            / len(one.answers),
        }
        for name, one in found.items()
    }
    print(f"\n{options.images} images, {len(found['float32'].asked)} questions")
    print_table(
        ("wire_dtype", "kB an image", "error of the values, %", "answers right, %", "answers as with float32, %"),
        [[name, *(f"{value:.{digits}f}" for value, digits in zip(row.values(), (1, 3, 1, 2), strict=True))]
         for name, row in rows.items()],
    )  # fmt: skip
    content = {
        "checkpoint": pathlib.Path(options.checkpoint).name,
        "dtype": "float32",
        "machine": machine(range(2)),
        "rows": rows,
    }
    write_results("wire_dtypes", content, options.out)


if __name__ == "__main__":
    main()
