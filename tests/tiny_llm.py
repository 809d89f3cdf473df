"""Engines on very small random checkpoints, requests for them, and a slow reference that keeps no cache."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.store import LLM_PREFIX, load_stage
from services.common.types import (
    CompressedVisualTokens,
    FinishedEvent,
    GenerateRequest,
    ImagePart,
    PromptTurn,
    SamplerSettings,
    SamplingParams,
    TextPart,
    TokenEvent,
)
from services.llm.attention import PackedStep
from services.llm.engine import Engine
from tests.tiny_checkpoints import make_random_checkpoint

WIDTH = 64
LAYERS = 6
QUESTIONS = (
    "What number is on the red card?",
    "Which word is written above the blue circle, and what colour is the triangle below it?",
    "How many?",
    "Describe the image in one sentence.",
)


@contextlib.contextmanager
def broken_layer(layer: int, message: str) -> Iterator[None]:
    """Passes raise RuntimeError(message) in this layer's attention, which every way through a layer calls."""
    attend = PackedStep.attend

    def fail(step: PackedStep, index: int, *arguments: Any) -> torch.Tensor:
        if index == layer:
            raise RuntimeError(message)
        return attend(step, index, *arguments)

    PackedStep.attend = fail  # type: ignore[method-assign]
    try:
        yield
    finally:
        PackedStep.attend = attend  # type: ignore[method-assign]


@functools.cache
def checkpoint(family: str = "llama", **options: Any) -> pathlib.Path:
    """A random checkpoint, made once a test process. Layer 2 of 6 prunes."""
    holder = tempfile.TemporaryDirectory(prefix="tiny-llm-")
    _holders.append(holder)
    folder = pathlib.Path(holder.name) / family
    make_random_checkpoint(folder, family, hidden=WIDTH, layers=LAYERS, **options)
    return folder


_holders: list[tempfile.TemporaryDirectory] = []


def engine(family: str = "llama", *, folder: pathlib.Path | None = None, **options: Any) -> Engine:
    defaults = {"kv_cache_bytes": 16 * 2**20, "max_batch_tokens": 512, "max_running": 32}
    return Engine.from_checkpoint(folder or checkpoint(family), **{**defaults, **options})


def image(made_by: str, tokens: int = 40, seed: int = 0, **changes: Any) -> CompressedVisualTokens:
    features = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
    plain = CompressedVisualTokens(
        tokens_ND=features,
        branch_ids_M=torch.empty(0, dtype=torch.uint8),
        map_hw=(4, 4),
        uncompressed_tokens=2 * tokens,
        content_hash=hashlib.sha256(features.numpy().tobytes()).hexdigest(),  # as good as that of the image's bytes
        model_fingerprint=made_by,
    )
    return replace(plain, **changes)


def request(
    target: Engine,
    request_id: str = "r",
    *,
    question: str = QUESTIONS[0],
    images: Sequence[int] = (40,),
    image_seed: int = 0,
    threshold: float | None = None,
    keep_ratio: float | None = None,
    text_sampler: bool = True,
    **sampling: Any,
) -> GenerateRequest:
    """A user turn with images of the given token counts before the question. End of sequence is ignored by default."""
    sampling = {"max_tokens": 8, "ignore_eos": True, **sampling}
    parts = (*(ImagePart(image=index) for index in range(len(images))), TextPart(text=question))
    return GenerateRequest(
        request_id=request_id,
        turns=(PromptTurn(role="user", parts=parts),),
        images=tuple(image(target.fingerprint, count, 100 * image_seed + index) for index, count in enumerate(images)),
        sampling=SamplingParams(**sampling),
        samplers=SamplerSettings(threshold=threshold, keep_ratio=keep_ratio, text_sampler=text_sampler),
    )


def mixed_requests(target: Engine, count: int) -> list[GenerateRequest]:
    """Many lengths; no, one and two images, some asked about before; off, thresholds and ratios; some sampled."""
    images = ((40,), (), (), (25, 31), (), (64,), (9,), (), (120,))
    prunes: tuple[dict[str, Any], ...] = (
        {}, {"text_sampler": False}, {"threshold": 0.3}, {"keep_ratio": 0.25}, {"threshold": 0.95}, {"threshold": 1.0},
        {"keep_ratio": 0.6},
    )  # fmt: skip
    draws: tuple[dict[str, Any], ...] = ({}, {}, {}, {"temperature": 1.0, "seed": 7}, {})
    made = [
        request(
            target,
            f"r{i}",
            question=QUESTIONS[(i // 2) % 4],
            images=images[i % 9],
            image_seed=i % 27,
            # A short prompt with a long answer is what outgrows the KV cache while it runs.
            **{"max_tokens": 70 if not images[i % 9] else 3 + (7 * i) % 19, **prunes[i % 7], **draws[i % 5]},
        )
        for i in range(count)
    ]
    # Requests with images come in bursts.
    return [
        r for start in range(0, count, 50) for r in sorted(made[start : start + 50], key=lambda r: len(r.images) > 0)
    ]


def run(target: Engine, requests: Sequence[GenerateRequest] = ()) -> dict[str, tuple[list[int], str, FinishedEvent]]:
    """Submits, steps until idle, and returns each request's (token ids, text, finished event)."""
    for each in requests:
        target.submit(each)
    events = []
    while target.has_work():
        events += target.step()
        target.check_integrity()
    return collect(events)


def collect(events: Sequence[tuple[str, Any]]) -> dict[str, tuple[list[int], str, FinishedEvent]]:
    ids: dict[str, list[int]] = {}
    texts: dict[str, str] = {}
    ends: dict[str, FinishedEvent] = {}
    for request_id, event in events:
        assert request_id not in ends, "an event after the last"
        if isinstance(event, TokenEvent):
            ids.setdefault(request_id, []).extend(event.token_ids)
            texts[request_id] = texts.get(request_id, "") + event.text
        else:
            ends[request_id] = event
    return {request_id: (ids.get(request_id, []), texts.get(request_id, ""), end) for request_id, end in ends.items()}


def reference_lm(folder: pathlib.Path, attention: str = "eager") -> Any:
    """transformers' own model with the checkpoint's weights, float32."""
    lm = AutoModelForCausalLM.from_config(FocusLlavaConfig.load(folder).text_config, attn_implementation=attention)
    state = {name.removeprefix(LLM_PREFIX): tensor.float() for name, tensor in load_stage(folder, "llm").items()}
    lm.load_state_dict(state)
    return lm.eval()


def reference_embeddings(lm: Any, target: Engine, asked: GenerateRequest) -> torch.Tensor:
    """Prompt embeddings [S, D] of a request, visual tokens spliced in one by one."""
    prompt = target.prepare(asked).prompt
    rows = [lm.model.embed_tokens.weight[token] for token in prompt.input_ids]
    for (first, last), one in zip(prompt.visual_spans, asked.images, strict=True):
        assert last - first == len(one.tokens_ND)
        rows[first:last] = list(one.tokens_ND.float())
    return torch.stack(rows)
