"""Sets a random checkpoint's vision-guided sampler so that it keeps a wanted share of an image's visual tokens.

A random selector would send every region to one branch. Here its one linear layer becomes a random projection, scaled
to tell regions of some pictures apart, plus a preference for coarse branches that is searched for until the share is
met. Which regions it picks means nothing; how many tokens it leaves is what a speed measurement needs.
"""

from __future__ import annotations

import pathlib

import torch

from benchmarks.workload import jpeg
from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.store import load_stage
from services.checkpoint.writer import CheckpointWriter
from services.common.types import ProjectedFeatureMap
from services.encoder.model import EncoderModel
from services.encoder.pipeline import EncoderPipeline

SELECTOR = "vision_guided_sampler.selector.linear"
PICTURES = 4
STEPS = 24


def set_vision_keep_ratio(folder: str | pathlib.Path, ratio: float, device: str = "cpu") -> float:
    """Rewrites the checkpoint's selector; returns the share of visual tokens that it keeps of 672 x 672 pictures.

    device: where the encoder runs for it. The share counts base tile and newlines, as the paper's 49 % does. Raises
    ValueError when it cannot be met.
    """
    folder = pathlib.Path(folder)
    encoder = EncoderPipeline.from_checkpoint(folder, device=device)
    model, branches = encoder.model, encoder.config.vision_sampler.branches
    linear = model.vision_guided_sampler.selector.linear
    stored = load_stage(folder, "encoder")
    dtype = stored[f"{SELECTOR}.weight"].dtype
    with torch.inference_mode():
        maps = model.project([encoder.prepare(jpeg(seed)).tiles for seed in range(PICTURES)])
        generator = torch.Generator().manual_seed(0)
        linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator))
        linear.bias.zero_()
        # Large enough that regions differ clearly, small enough that the softmax is not all ones and zeros.
        spread = torch.cat([_log_odds(model, m) for m in maps]).std(0).mean()
        linear.weight.copy_((linear.weight.float() * (2 / spread)).to(dtype))
        coarseness_K = torch.tensor([float(height * width) for height, width in branches], device=device).log2()
        centre_K = torch.cat([_log_odds(model, m) for m in maps]).mean(0)
        low, high, kept = -20.0, 20.0, 0.0
        for _ in range(STEPS):
            preference = (low + high) / 2
            linear.bias.copy_((preference * (coarseness_K - coarseness_K.mean()) - centre_K).to(dtype))
            kept = kept_share(model, maps)
            low, high = (preference, high) if kept > ratio else (low, preference)
    if abs(kept - ratio) > 0.02:
        raise ValueError(f"the nearest share that this sampler can keep is {kept:.3f}, not {ratio}")
    # Only the selector changed, and a served encoder's packed weights are in no state dict.
    stored |= {f"{SELECTOR}.weight": linear.weight.to(dtype), f"{SELECTOR}.bias": linear.bias.to(dtype)}
    with CheckpointWriter(folder, FocusLlavaConfig.load(folder)) as writer:
        for name, tensor in stored.items():
            writer.add(name, tensor.clone())
        writer.link("llm", folder)
        writer.finish(folder)
    return kept


def _log_odds(model: EncoderModel, feature_map: ProjectedFeatureMap) -> torch.Tensor:
    """float32 [M, K]: the selector's logits, less their mean over the branches."""
    probs_MK = model.tokens(feature_map, True).sampled.probs_MK  # type: ignore[union-attr]
    log_MK = probs_MK.clamp_min(1e-30).log()
    return log_MK - log_MK.mean(1, keepdim=True)


def kept_share(model: EncoderModel, maps: list[ProjectedFeatureMap]) -> float:
    """Visual tokens after the vision-guided sampler, over those before it."""
    encoded = [model.tokens(feature_map, True) for feature_map in maps]
    return sum(len(e.tokens_ND) for e in encoded) / sum(e.uncompressed_tokens for e in encoded)
