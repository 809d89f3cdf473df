"""Uniform down-sampling: one kernel for the whole map, 2x2 for a quarter of the tokens.

Not one paper's idea. Average pooling of visual tokens before or after the projector is the common baseline of this
field; max-pooling is what the vision-guided sampler's branches do, so that `reduce="max"` is the sampler without its
choice. Edge cells are partial: only real tokens enter.

A kernel cannot meet every budget. The smallest one whose share does not exceed the budget is taken, sides no further
apart than 1 to 2 and the longer one horizontal (1 -> 1x1, 0.5 -> 1x2, 0.25 -> 2x2, 0.1 -> 3x4), and partial edge
cells may exceed it: compare by the count that comes out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from training.experiments.rivals.base import ReducedMap, RivalInput, check_newline_rows, check_share, emit


def kernel_within(budget: float) -> tuple[int, int]:
    """Height and width of the kernel for this budget."""
    area = math.ceil(round(1 / budget, 6))
    while True:
        for height in range(math.isqrt(area), 0, -1):
            if area % height == 0 and area // height <= 2 * height:
                return height, area // height
        area += 1


@dataclass(frozen=True, kw_only=True)
class Downsample:
    reduce: Literal["mean", "max"]
    budget: float = 0.25
    newline_rows: int = 1

    def __post_init__(self) -> None:
        check_share(self.budget)
        check_newline_rows(self.newline_rows)

    def __call__(self, image: RivalInput) -> ReducedMap:
        kernel = kernel_within(self.budget)
        height, width, _ = image.map_HWD.shape
        map_DHW = image.map_HWD.permute(2, 0, 1)
        if self.reduce == "max":
            pooled = nn.functional.max_pool2d(map_DHW, kernel, ceil_mode=True)
        else:
            # Summed in float32: the mean of four bf16 numbers is rounded once.
            pooled = nn.functional.avg_pool2d(map_DHW.float(), kernel, ceil_mode=True, count_include_pad=False)
        cells_KD = pooled.permute(1, 2, 0).flatten(0, 1).to(image.map_HWD.dtype)
        top = torch.arange(0, height, kernel[0], device=cells_KD.device)
        left = torch.arange(0, width, kernel[1], device=cells_KD.device)
        return emit(cells_KD, (top.unsqueeze(1) * width + left).flatten(), image, self.newline_rows)
