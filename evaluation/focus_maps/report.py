"""The focus maps of one question as files: a page (PNG) and everything on it as numbers (JSON).

The JSON is one object. Boxes are [x0, y0, x1, y1] in pixels of the upright image, to a hundredth; lists of tokens are
in the order in which the language model gets them.

    format_version   2
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
      regions        null with the vision-guided sampler off, else {x, y, kernels, branches, branch_shares}: edges of
                     the grid's columns and rows (up to half a token at an edge of the image may be outside), the
                     pooling kernel [height, width] of each branch, the branch of each region in raster order, and
                     the share of the regions that chose each branch
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

from evaluation.focus_maps.focus import Focus, FocusModel
from evaluation.focus_maps.page import page
from focusllava.focus_maps import FocusRegions
from focusllava.messages import Settings
from services.checkpoint.finding import find_checkpoint
from services.common.errors import InvalidInput

FORMAT_VERSION = 2


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
    usage, maps = focus.usage, focus.maps
    images, first_token = [], 0
    for name, shown, where in zip(names, focus.pictures, maps.maps, strict=True):
        images.append(
            {
                "name": name,
                "size_wh": [where.width, where.height],
                "content_hash": shown.tokens.content_hash,
                "notes": list(shown.tokens.notes),
                "map_hw": list(shown.tokens.map_hw),
                "regions": _regions(where.regions) if where.regions else None,
                "first_token": first_token,
                "base_tokens": where.base_tokens,
                "boxes": [box and [round(edge, 2) for edge in box] for box in where.boxes],
                "kept": [index for index, kept in enumerate(where.kept) if kept],
                "importance": [
                    [float(f"{value:.5g}") for value in row]
                    for row in focus.of_picture(focus.importance_KN, where.image).tolist()
                ],
            }
        )
        first_token += len(where.boxes)
    return {
        "format_version": FORMAT_VERSION,
        "question": focus.question,
        "answer": focus.answer,
        "model_fingerprint": focus.pictures[0].tokens.model_fingerprint,
        "layers": list(range(1, 1 + len(focus.importance_KN))),
        "pruning": {"layer": maps.prune_layer, "threshold": maps.threshold, "keep_ratio": maps.keep_ratio}
        if maps.prune_layer
        else None,
        "visual_tokens": {
            "uncompressed": usage.visual_tokens_uncompressed,
            "sampled": usage.visual_tokens_sampled,
            "kept": usage.visual_tokens_kept,
            "converted_share": round(usage.converted_share_percent / 100, 4),
        },
        "images": images,
    }


def _regions(regions: FocusRegions) -> dict[str, Any]:
    return {
        "x": [round(edge, 2) for edge in regions.x],
        "y": [round(edge, 2) for edge in regions.y],
        "kernels": [list(kernel) for kernel in regions.kernels],
        "branches": list(regions.branch_ids),
        "branch_shares": [round(share, 4) for share in regions.branch_shares()],
    }
