"""The data's whole way on the shipped model: tiles, visual tokens, a pruned prompt, an answer. Start reading here."""

from __future__ import annotations

import pathlib

import pytest
import torch

from services.common.types import GenerateRequest, ImagePart, PromptTurn, TextPart
from services.encoder.pipeline import EncoderPipeline
from tests import tiny_llm

ROOT = pathlib.Path(__file__).parents[1]
CHECKPOINT = ROOT / "checkpoints" / "focusllava-tiny"
IMAGE = ROOT / "docs" / "assets" / "sample.png"


@pytest.mark.parametrize(
    ("question", "answer", "kept"),
    [("What number is on the red card?", "60", 53), ("What word is on the yellow card?", "hen", 30)],
)
def test_an_image_and_a_question_become_an_answer(question: str, answer: str, kept: int) -> None:
    # Stage 1: a base tile and 3 x 3 grid tiles of 96 px. The grid's features, less the padding, are a map of 16 x 24.
    pipeline = EncoderPipeline.from_checkpoint(CHECKPOINT, dtype=torch.float32)
    image = pipeline.prepare(IMAGE.read_bytes())
    assert image.tiles.pixels_T3HW.shape == (1 + 3 * 3, 3, 96, 96)

    # Without a sampler: 64 tokens of the base tile, then the map's, with a newline after each of its rows.
    (tokens,) = pipeline.encode([image], [False])
    assert tokens.map_hw == (16, 24) and len(tokens.tokens_ND) == 64 + 16 * (24 + 1)

    # The vision-guided sampler keeps 13 of the 4 x 6 regions at 16 tokens and pools 11, the empty ones, to one each.
    (tokens,) = pipeline.encode([image], [True])
    assert tokens.branch_ids_M.bincount().tolist() == [13, 0, 11]
    assert len(tokens.tokens_ND) == 64 + 13 * 16 + 11 + 16

    # Stage 2: each question keeps its own visual tokens from layer 3 on, and the answer is decoded.
    engine = tiny_llm.engine(folder=CHECKPOINT, dtype=torch.float32)
    turn = PromptTurn(role="user", parts=(ImagePart(image=0), TextPart(text=question)))
    answers = tiny_llm.run(engine, [GenerateRequest(request_id="first", turns=(turn,), images=(tokens,))])
    _, text, end = answers["first"]
    assert text.strip() == answer and end.reason == "stop"
    usage = end.usage
    counts = (usage.visual_tokens_uncompressed, usage.visual_tokens_sampled, usage.visual_tokens_kept)
    assert (*counts, usage.prune_layer) == (464, 299, kept, 3)
    assert usage.prompt_tokens == 299 + 15  # the chat template and seven words
