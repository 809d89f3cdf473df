"""Backgrounds that are not even: paper, stripes, soft blotches. They show nothing, so they should cost nothing.

Posters of the benchmark have flat backgrounds, few gradients and a little noise; a page has more. These tell whether an
empty region is empty to a model whatever it is made of, or teach it so. Text and shapes stay as easy to see.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from training.data.scenes import Background

Pattern = Literal["paper", "stripes", "blotches"]

SHARE = 0.5
"""How often a background has a pattern."""
REACH = (3, 10)
"""Fewest and most of 255 by which a pattern changes a channel."""
PERIOD_PX: dict[Pattern, tuple[int, int]] = {"paper": (2, 5), "stripes": (6, 30), "blotches": (16, 60)}
"""Model pixels of a fibre of paper, of a stripe with its gap, and of a blotch."""
GRADIENT_SHARE = 0.4
"""How often a pattern lies on a gradient."""


@dataclass(frozen=True, kw_only=True)
class Texture(Background):
    """A background with a pattern over its tint or gradient."""

    pattern: Pattern
    reach: int
    """Largest change of a channel by the pattern, of 255."""
    period_px: int
    angle: float
    """Direction across the stripes in radians; the other patterns have none."""

    def change(self, height: int, width: int) -> np.ndarray:
        """What the pattern adds to each pixel's channels, float64 [height, width, 1]."""
        if self.pattern == "stripes":
            y, x = np.mgrid[:height, :width]
            across = x * math.cos(self.angle) + y * math.sin(self.angle)
            pattern = np.sin(2 * math.pi * across / self.period_px)
        else:
            rng = np.random.default_rng(self.noise_seed)
            pattern = _soft_noise(rng, height, width, self.period_px)
            if self.pattern == "paper":
                pattern = (pattern + rng.uniform(-1, 1, (height, width))) / 2
        return self.reach * pattern[:, :, None]


def often_textured(rng: random.Random, plain: Background) -> Background:
    """A pattern on the tint of a plain background in SHARE of the cases, else the background itself."""
    return sample_texture(rng, plain) if rng.random() < SHARE else plain


def sample_texture(rng: random.Random, plain: Background) -> Texture:
    """A random pattern on the tint of a plain background."""
    pattern: Pattern = rng.choice(get_args(Pattern))
    end_colour = tuple(min(255, max(215, channel + rng.randint(-25, 25))) for channel in plain.colour)
    return Texture(
        colour=plain.colour,
        end_colour=end_colour if rng.random() < GRADIENT_SHARE else plain.colour,  # type: ignore[arg-type]
        noise_amplitude=0,
        noise_seed=rng.getrandbits(32),
        pattern=pattern,
        reach=rng.randint(*REACH),
        period_px=rng.randint(*PERIOD_PX[pattern]),
        angle=rng.uniform(0, math.pi),
    )


def _soft_noise(rng: np.random.Generator, height: int, width: int, period_px: int) -> np.ndarray:
    """Random values at points `period_px` apart, bilinear between them: float64 [height, width] in -1..1."""
    points = rng.uniform(-1, 1, (height // period_px + 2, width // period_px + 2))
    y, x = np.arange(height) / period_px, np.arange(width) / period_px
    top, left = y.astype(int), x.astype(int)
    down, right = (y - top)[:, None], x - left
    rows = points[top] * (1 - down) + points[top + 1] * down
    return rows[:, left] * (1 - right) + rows[:, left + 1] * right
