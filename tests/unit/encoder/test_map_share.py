"""A request's `map_share`: the most that the vision-guided sampler leaves of an image's feature map."""

from __future__ import annotations

import pytest
import torch

from services.common.errors import InvalidInput
from services.common.types import CompressedVisualTokens, ImageOptions
from services.encoder.pipeline import EncoderPipeline
from services.sampler.calibration import tokens_by_branch

CHECKPOINT, SAMPLE = "checkpoints/focusllava-tiny", "docs/assets/sample.png"


@pytest.fixture(scope="module")
def pipeline() -> EncoderPipeline:
    return EncoderPipeline.from_checkpoint(CHECKPOINT, dtype=torch.float32)


def encoded(pipeline: EncoderPipeline, *shares: float | None, detail="high") -> list[CompressedVisualTokens]:
    """The sample with each share, in one batch."""
    with open(SAMPLE, "rb") as file:
        data = file.read()
    images = [pipeline.prepare(data, options=ImageOptions(detail=detail, map_share=share)) for share in shares]
    return pipeline.encode(images, [True] * len(images))


def share_of(pipeline: EncoderPipeline, tokens: CompressedVisualTokens) -> float:
    """What is left of the map, newlines not counted."""
    tokens_MK = tokens_by_branch(tokens.map_hw, pipeline.model.vision_guided_sampler)
    left = tokens_MK.gather(1, tokens.branch_ids_M.long()[:, None]).sum()
    return int(left) / (tokens.map_hw[0] * tokens.map_hw[1])


def test_it_bounds_what_is_left_and_coarsens_in_one_order(pipeline):
    free, *within = encoded(pipeline, None, 0.5, 0.4, 0.2, 0.01)
    assert share_of(pipeline, free) > 0.5, "the bounds below are to bite"
    finest = free.branch_ids_M
    for tokens, share in zip(within, (0.5, 0.4, 0.2), strict=False):
        assert share - 0.05 < share_of(pipeline, tokens) <= share
        assert (tokens.branch_ids_M >= finest).all(), "no region gets more detail than with a larger share"
        assert tokens.uncompressed_tokens == free.uncompressed_tokens
        finest = tokens.branch_ids_M
    assert (within[-1].branch_ids_M == 2).all(), "as few as the coarsest branch leaves"


def test_a_share_that_the_sampler_keeps_by_itself_changes_nothing(pipeline):
    free, wide = encoded(pipeline, None, 1.0)
    assert torch.equal(free.tokens_ND, wide.tokens_ND) and torch.equal(free.branch_ids_M, wide.branch_ids_M)


def test_with_low_detail_there_is_no_map_to_bound(pipeline):
    free, bounded = encoded(pipeline, None, 0.1, detail="low")
    assert torch.equal(free.tokens_ND, bounded.tokens_ND)


def test_it_is_refused_with_the_sampler_off(pipeline):
    with pytest.raises(InvalidInput, match=r"^options\.map_share: is 0\.5 with the vision-guided sampler off"):
        pipeline.prepare(b"", False, ImageOptions(map_share=0.5))
