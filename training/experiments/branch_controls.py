"""Controls of the vision-guided sampler: branches that no selector chose, to tell looking from luck.

A control stands in the selector's place (`services.sampler.vision_guided.Choice`), in training and in evaluation.
Its branches carry no gate, so the task's loss never reaches the selector.

Legend: M regions in raster order, K branches, finest first.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import torch

from services.common.settings import require
from services.sampler.vision_guided import Choice
from training.data.branches import Boxes

ControlName = Literal["random", "uniform", "oracle", "no_task_gradient", "permuted"]


@dataclass(frozen=True, kw_only=True)
class BranchControl:
    """Who decides instead of the selector."""

    name: ControlName
    """random: each region by `shares`; uniform: all `branch`; oracle: the finest where a glyph box is, else the
    coarsest; no_task_gradient: the selector itself, trained by the balance loss alone; permuted: the selector's own
    branches dealt to the image's regions anew (evaluation only)."""
    shares: tuple[float, ...] = ()
    """random: probability of each branch."""
    branch: int = 0
    """uniform: index of the branch."""

    def __post_init__(self) -> None:
        right = self.name != "random" or bool(self.shares) and min(self.shares) >= 0 and sum(self.shares) > 0
        require(right, "shares", self.shares, "probabilities of the branches")

    @property
    def selects(self) -> bool:
        """Whether the selector is still asked, and so trained by the balance loss."""
        return self.name in ("no_task_gradient", "permuted")

    def choice(self, rng: random.Random, map_hw: tuple[int, int], window: int, glyph_boxes: Boxes) -> Choice:
        """One image's. What is drawn depends on `rng` alone; boxes are fractions of width and height."""
        generator = torch.Generator().manual_seed(rng.getrandbits(62))

        def choose(probs_MK: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
            regions, branches = probs_MK.shape
            if self.name == "random":
                shares_K = torch.tensor(self.shares, dtype=torch.float32)
                chosen_M = torch.multinomial(shares_K, regions, replacement=True, generator=generator)
            elif self.name == "uniform":
                chosen_M = torch.full((regions,), self.branch)
            elif self.name == "oracle":
                touched_M = regions_touched(glyph_boxes, map_hw, window, grid)
                chosen_M = torch.where(touched_M, 0, branches - 1)
            else:
                chosen_M = probs_MK.argmax(1).cpu()
                if self.name == "permuted":
                    chosen_M = chosen_M[torch.randperm(regions, generator=generator)]
            return chosen_M.to(probs_MK.device)

        return choose


def regions_touched(boxes: Boxes, map_hw: tuple[int, int], window: int, grid: tuple[int, int]) -> torch.Tensor:
    """Whether each region shares an area with a box: bool [M]."""
    touched = torch.zeros(grid, dtype=torch.bool)
    (height, width), side = map_hw, float(window)
    for x0, y0, x1, y1 in boxes:
        rows = _span(y0 * height / side, y1 * height / side)
        columns = _span(x0 * width / side, x1 * width / side)
        touched[rows, columns] = True
    return touched.flatten()


def _span(start: float, end: float) -> slice:
    """Indices of the unit cells that an interval reaches into."""
    last = int(-(-end // 1))
    return slice(max(int(start), 0), max(last, 0))
