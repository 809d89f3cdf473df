"""Sets how much of the feature map a trained checkpoint's vision-guided sampler leaves, on images of your own.

    python -m training.calibrate CHECKPOINT OUTPUT --images FOLDER --map-share 0.6
    python -m training.calibrate CHECKPOINT OUTPUT --images FOLDER --branch-shares 0.5 0.1 0.4

Only the selector's biases change. The language model's weights are linked where the file system allows it.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

import torch

from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.store import load_stage
from services.checkpoint.writer import CheckpointWriter
from services.common.errors import FocusError, InvalidInput
from services.encoder.pipeline import EncoderPipeline
from services.sampler.calibration import Seen, set_branch_shares, set_map_share

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
BIAS = "vision_guided_sampler.selector.linear.bias"


def calibrate(
    checkpoint: pathlib.Path, output: pathlib.Path, images: list[pathlib.Path], share: float | Sequence[float]
) -> float:
    """Writes the checkpoint anew at `output`; returns the share of the maps' tokens that is then left.

    share: the one to leave, or shares of the regions, one a branch. Raises InvalidInput naming what is wrong.
    """
    if not images:
        raise InvalidInput("holds no image", field="--images")
    pipeline = EncoderPipeline.from_checkpoint(checkpoint)
    if not pipeline.config.vision_sampler.enabled:
        raise InvalidInput("is off, there is nothing to set", field="vision_sampler.enabled")
    encoder = pipeline.model
    sampler = encoder.vision_guided_sampler
    seen: list[Seen] = []
    with torch.inference_mode():
        for path in images:
            try:
                tiles = pipeline.prepare(path.read_bytes()).tiles
            except FocusError as error:
                raise InvalidInput(f"{path.name}: {error}", field="--images") from None
            seen += encoder.seen(encoder.project([tiles]))
    stored = load_stage(checkpoint, "encoder")
    # The bias takes the dtype that it is stored in, which need not be the one computed in: then what is met is left.
    bias = sampler.selector.linear.bias
    bias.data = bias.data.to(stored[BIAS].dtype)
    met = set_map_share(sampler, seen, share) if isinstance(share, float) else set_branch_shares(sampler, seen, share)
    stored[BIAS] = bias.data
    readme = checkpoint / "README.md"
    with CheckpointWriter(output, FocusLlavaConfig.load(checkpoint)) as writer:
        for name, tensor in stored.items():
            writer.add(name, tensor.clone())
        writer.link("llm", checkpoint)
        writer.finish(checkpoint, readme=readme.read_text("utf8") if readme.is_file() else None)
    return met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path, help="may be the checkpoint itself")
    parser.add_argument("--images", type=pathlib.Path, required=True, help="folder of representative image files")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--map-share", type=float, dest="share", help="tokens left of the feature map, 0 to 1")
    asked.add_argument("--branch-shares", type=float, nargs="+", dest="share", metavar="SHARE",
                       help="regions of each branch, finest first, 0 to 1")  # fmt: skip
    parser.add_argument("--most", type=int, default=200, help="images that are looked at")
    options = parser.parse_args()
    found = options.images.iterdir() if options.images.is_dir() else ()
    files = sorted(path for path in found if path.suffix.lower() in SUFFIXES)
    try:
        met = calibrate(options.checkpoint, options.output, files[: options.most], options.share)
    except FocusError as error:
        sys.exit(f"calibrate: {error}")
    print(f"{options.output}: the vision-guided sampler leaves {met:.1%} of the feature map")


if __name__ == "__main__":
    main()
