"""What the vision-guided sampler does with empty and with busy regions: python -m evaluation.regions CHECKPOINT

It looks at posters of the benchmark. An empty region shows the background alone, to the pixel. The busiest tenth are
the regions of all posters in which brightness changes most from pixel to pixel, whether anybody asks about them or not:
patterns that are there to catch the eye are among them.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.focus_maps.focus import FocusModel
from evaluation.scenes import SEEDS
from evaluation.score import positive
from training.data.pairs import PosterSplit
from training.data.posters import Poster, poster_at, render_poster, textured_poster_at
from training.data.rendering import render_background

BUSIEST = 0.1


@dataclass(frozen=True, kw_only=True)
class Region:
    """One region of a poster's feature map."""

    branch: int
    empty: bool
    busyness: float
    """Mean change of brightness from a pixel to its right and lower neighbours, in channel values."""


def regions(model: FocusModel, poster: Poster) -> Iterator[Region]:
    """The regions of a poster, as the model's sampler chose for them."""
    image, file = render_poster(poster), io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    grid = model.encode(file.getvalue()).map.regions
    if grid is None:  # too narrow for a feature map
        return
    scene = poster.scene
    background = np.asarray(render_background(scene.background, scene.size_wh, scene.render_scale))
    drawn_HW = (np.asarray(image) != background).any(-1)
    changes_HW = _changes(np.asarray(image).mean(-1))
    for edges, branch in zip(grid.boxes, grid.branch_ids, strict=True):
        x0, y0, x1, y1 = map(round, edges)
        box = np.s_[y0:y1, x0:x1]
        yield Region(branch=branch, empty=not drawn_HW[box].any(), busyness=float(changes_HW[box].mean()))


def branch_shares(of: Sequence[Region], branches: int) -> list[float]:
    """The share of the regions that chose each branch."""
    counts = np.bincount([region.branch for region in of], minlength=branches)
    return (counts / max(1, len(of))).tolist()


def busiest(of: Sequence[Region], share: float = BUSIEST) -> list[Region]:
    """The busiest regions: so large a share of them, one at least."""
    return sorted(of, key=lambda region: -region.busyness)[: max(1, int(share * len(of)))]


def _changes(brightness_HW: np.ndarray) -> np.ndarray:
    across = np.abs(np.diff(brightness_HW, axis=1, append=brightness_HW[:, -1:]))
    return across + np.abs(np.diff(brightness_HW, axis=0, append=brightness_HW[-1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--split", choices=tuple(SEEDS), default="test")
    parser.add_argument("--images", type=positive, default=24)
    parser.add_argument("--textured", action="store_true", help="half of the posters on paper, stripes or blotches")
    arguments = parser.parse_args()
    split: PosterSplit = arguments.split
    at = textured_poster_at if arguments.textured else poster_at
    model = FocusModel(arguments.checkpoint)
    found = [region for n in range(arguments.images) for region in regions(model, at(split, SEEDS[split], n))]
    branches = model.pipeline.config.vision_sampler.branches
    print(f"| regions | count | {' | '.join(f'{height}x{width} %' for height, width in branches)} |")
    print(f"|---|---|{'---|' * len(branches)}")
    rows = {"all": found, "empty": [one for one in found if one.empty], "busiest tenth": busiest(found)}
    for name, of in rows.items():
        shares = " | ".join(f"{100 * share:.0f}" for share in branch_shares(of, len(branches)))
        print(f"| {name} | {len(of)} | {shares} |")


if __name__ == "__main__":
    main()
