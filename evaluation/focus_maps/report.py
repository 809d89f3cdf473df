"""The focus maps of one question as files: a page (PNG) and everything on it as numbers (JSON).

The JSON is one object. Boxes are [x0, y0, x1, y1] in pixels of the upright image, to a hundredth; lists of tokens are
in the order in which the language model gets them.

    format_version   1
    question, answer, model_fingerprint
    layers           [1, ..., L - 1], the layers before which importance was scored
    pruning          null where nothing was pruned, else {layer, threshold, keep_ratio}; one of the last two is null
    visual_tokens    {uncompressed, sampled, kept, converted_share}: counts over all images, and the share 0..1
    images           one object an image:
      name           as given
      size_wh        [width, height] of the upright image
      content_hash   SHA-256 of its file
      notes          how it was read, in words
      map_hw         [height, width] of the unpadded feature map, in tokens
      map_box        what that map shows; up to half a token at an edge may be missing
      window         side of a region in tokens; 1 with the vision-guided sampler off
      branches       [[height, width], ...] pooling kernel of each branch
      branch_shares  share of the regions that chose each branch
      region_grid    [rows, columns]
      regions        {box: [M boxes], branch: [M branch numbers]}, in raster order
      first_token    index of this image's first token among all images' tokens
      base_tokens    so many first tokens are the base tile's
      boxes          [N boxes], null for a newline
      kept           indices of the tokens kept, ascending, counted from 0 in this image
      importance     [[N numbers], ...] one list a layer of `layers`, five significant digits
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any, Unpack

import torch

from evaluation.focus_maps.focus import Focus, FocusModel
from evaluation.focus_maps.page import page
from focusllava.messages import Settings
from services.checkpoint.finding import find_checkpoint
from services.common.errors import InvalidInput

FORMAT_VERSION = 1


def explain(
    checkpoint: str | pathlib.Path | None,
    images: Sequence[tuple[str, bytes]],
    question: str,
    output: pathlib.Path,
    **settings: Unpack[Settings],
) -> dict[str, Any]:
    """Asks one checkpoint about images (name and file of each) and writes `output` (.png) and a .json beside it.

    checkpoint: as for `find_checkpoint`. Returns the report. Raises InvalidInput where an argument is of no use.
    """
    if output.suffix.lower() != ".png":
        raise InvalidInput(f"is {str(output)!r}, expected a name that ends in .png", field="output")
    if not output.parent.is_dir():
        raise InvalidInput(f"is {str(output)!r}, which lies in no folder that exists", field="output")
    model = FocusModel(find_checkpoint(checkpoint))
    pictures = [model.encode(file, vision_sampler=settings.get("vision_sampler") is not False) for _, file in images]
    focus = model.ask(pictures, question, **settings)
    made = report(focus, [name for name, _ in images])
    page(focus).save(output, "PNG")
    output.with_suffix(".json").write_text(json.dumps(made, ensure_ascii=False) + "\n", encoding="utf8")
    return made


def report(focus: Focus, names: Sequence[str]) -> dict[str, Any]:
    """The JSON object of the module's docstring; names: one an image."""
    usage, decision = focus.usage, focus.decision
    images, first_token = [], 0
    for index, (name, shown) in enumerate(zip(names, focus.pictures, strict=True)):
        where, tokens = shown.layout, shown.tokens
        images.append(
            {
                "name": name,
                "size_wh": list(reversed(where.image_size_hw)),
                "content_hash": tokens.content_hash,
                "notes": list(tokens.notes),
                "map_hw": list(tokens.map_hw),
                "map_box": [round(edge, 2) for edge in where.map_box],
                "window": where.window,
                "branches": [list(kernel) for kernel in where.branches],
                "branch_shares": [round(share, 4) for share in where.branch_shares()],
                "region_grid": list(where.region_grid),
                "regions": {"box": _boxes(where.region_boxes_M4), "branch": where.branch_ids_M.tolist()},
                "first_token": first_token,
                "base_tokens": where.base_tokens,
                "boxes": _boxes(where.boxes_N4),
                "kept": focus.of_picture(focus.kept_N, index).nonzero().flatten().tolist(),
                "importance": [
                    [float(f"{value:.5g}") for value in row]
                    for row in focus.of_picture(focus.importance_KN, index).tolist()
                ],
            }
        )
        first_token += len(where)
    return {
        "format_version": FORMAT_VERSION,
        "question": focus.question,
        "answer": focus.answer,
        "model_fingerprint": focus.pictures[0].tokens.model_fingerprint,
        "layers": list(range(1, 1 + len(focus.importance_KN))),
        "pruning": decision
        and {"layer": decision.layer, "threshold": decision.threshold, "keep_ratio": decision.keep_ratio},
        "visual_tokens": {
            "uncompressed": usage.visual_tokens_uncompressed,
            "sampled": usage.visual_tokens_sampled,
            "kept": usage.visual_tokens_kept,
            "converted_share": round(usage.converted_share_percent / 100, 4),
        },
        "images": images,
    }


def _boxes(boxes_N4: torch.Tensor) -> list[list[float] | None]:
    return [None if box[0] != box[0] else [round(edge, 2) for edge in box] for box in boxes_N4.tolist()]
