"""What serving emits and reports, of images of two sizes in one prompt, is what naive loops say."""

import pytest
import torch

from services.checkpoint.config import TextSamplerConfig, VisionSamplerConfig
from services.common.types import (
    CompressedVisualTokens,
    GenerateRequest,
    ImagePart,
    PromptTurn,
    SamplingParams,
    TextPart,
)
from services.encoder.pipeline import EncoderPipeline
from services.llm.engine import Engine
from tests.serving_client import picture
from tests.tiny_checkpoints import make_random_checkpoint
from tests.unit.sampler import oracles as oracle


@pytest.mark.parametrize("order", ["region", "row"])
@pytest.mark.parametrize("base_tile", ["keep", "sample", "drop"])
@pytest.mark.parametrize("pruned", [False, True])
def test_serving_emits_and_reports_what_the_loops_say(tmp_path, base_tile, pruned, order):
    folder, side, layers, prune_layer = tmp_path / "checkpoint", 4, 3, 1
    sampler = VisionSamplerConfig(
        base_grid=(side, side), similarity="normalized", region_pool="max", base_tile=base_tile, window=2,
        branches=((1, 1), (2, 2)), balance_coefficients=(1.0, 1.0), token_order=order,
    )  # fmt: skip
    text_sampler = TextSamplerConfig(layer=prune_layer, threshold=0.5, enabled=pruned)
    make_random_checkpoint(folder, layers=layers, vision_sampler=sampler, text_sampler=text_sampler)
    pipeline = EncoderPipeline.from_checkpoint(folder)
    engine = Engine.from_checkpoint(folder, kv_cache_bytes=1 << 23)
    images = [pipeline.prepare(picture(seed, size_wh)) for seed, size_wh in ((0, (56, 40)), (1, (80, 30)))]
    encoded: list[CompressedVisualTokens] = pipeline.encode(images, [True, True])
    with torch.inference_mode():
        maps = pipeline.model.project([image.tiles for image in images])
    linear, newline = pipeline.model.vision_guided_sampler.selector.linear, pipeline.model.image_newline.tolist()
    chooser = oracle.Selection(weight=linear.weight.tolist(), bias=linear.bias.tolist(), similarity="normalized",
                               region_pool="max")  # fmt: skip
    uncompressed = 0
    for features, tokens in zip(maps, encoded, strict=True):
        base, grid = features.base_PD.tolist(), features.map_HWD.tolist()

        def sampled(of, base=base):
            chosen = oracle.likeliest(oracle.probabilities(of, base, 2, chooser))
            return oracle.tokens(of, newline, 2, sampler.branches, chosen, order), chosen

        square = [base[row * side : (row + 1) * side] for row in range(side)]
        first = {"keep": base, "sample": sampled(square)[0], "drop": []}[base_tile]
        expected, chosen = sampled(grid)
        torch.testing.assert_close(tokens.tokens_ND, torch.tensor([*first, *expected]), rtol=1e-4, atol=1e-4)
        assert tokens.branch_ids_M.tolist() == chosen and len(set(chosen)) == 2
        assert tokens.uncompressed_tokens == side * side + len(grid) * (len(grid[0]) + 1)
        assert tokens.map_hw == (len(grid), len(grid[0]))
        uncompressed += tokens.uncompressed_tokens

    parts = (ImagePart(image=0), ImagePart(image=1), TextPart(text="Which word is written above?"))
    turns = (PromptTurn(role="user", parts=parts),)
    sampling = SamplingParams(max_tokens=1, ignore_eos=True)
    engine.submit(GenerateRequest(request_id="r", turns=turns, images=tuple(encoded), sampling=sampling))
    events = []
    while engine.has_work():
        events += engine.step()
    usage = events[-1][1].usage
    total = sum(len(tokens.tokens_ND) for tokens in encoded)
    assert (usage.visual_tokens_uncompressed, usage.visual_tokens_sampled) == (uncompressed, total)
    assert (usage.visual_tokens_kept < total) == pruned
    seen = [total] * prune_layer + [usage.visual_tokens_kept] * (layers - prune_layer)
    assert usage.converted_visual_tokens == pytest.approx(sum(seen) / layers)
    assert usage.converted_share == pytest.approx(sum(seen) / layers / uncompressed)
