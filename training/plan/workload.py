"""The sample that a plan reckons with: its tiles, its tokens, and how many of them each layer of the decoder sees.

Legend: L decoder layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.sizing import tiles_of_an_image
from services.checkpoint.supported import largest_image
from services.common.errors import InvalidInput
from services.common.settings import require

PAPER_VISION = 0.49
"""Visual tokens that the vision-guided sampler leaves, as a share; Tab. 2 of the paper."""
PAPER_TEXT = 0.73
"""Visual tokens that go on at the text-guided sampler, as a share of those that reach it, with a threshold of 0.85.

The paper's 39 % of the tokens, converted, are 0.49 x (1 - n * 24 / 32) for a share n that leaves before layer 8 of 32.
"""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One sample as a step sees it."""

    tiles: int
    """Tiles of its images, base tiles included."""
    map_tokens: int
    """Visual tokens before the samplers."""
    text_tokens: int
    """Words and markers, answers among them."""
    answer_tokens: int
    """Tokens with a label."""
    vision_share: float = 1.0
    """The share of the visual tokens that the vision-guided sampler leaves."""
    text_share: float = 1.0
    """The share of what reaches it that the text-guided sampler lets go on."""
    cuts: tuple[int, ...] = ()
    """The layers before which it prunes, each as often as the others."""

    @property
    def longest(self) -> int:
        """Tokens of the sequence that the first layer sees."""
        return self.text_tokens + round(self.map_tokens * self.vision_share)

    def tokens_L(self, layers: int, cut: int | None) -> list[int]:
        """Tokens that each layer sees where the text-guided sampler prunes before layer `cut`; None: nowhere."""
        visual = self.map_tokens * self.vision_share
        after = visual * self.text_share
        return [self.text_tokens + round(visual if cut is None or layer < cut else after) for layer in range(layers)]

    def draws(self, layers: int) -> list[list[int]]:
        """The tokens of each layer, for every layer that may be drawn."""
        return [self.tokens_L(layers, cut) for cut in self.cuts or (None,)]


def image_workload(
    model: FocusLlavaConfig,
    *,
    images: int = 1,
    text_tokens: int,
    answer_tokens: int,
    cuts: tuple[int, int] | None = None,
    vision_share: float = 1.0,
    text_share: float = 1.0,
) -> Workload:
    """A conversation about images of the largest size. cuts: first and last layer that may be drawn, None: no pruning.

    Raises InvalidInput: more answer tokens than words.
    """
    require(answer_tokens <= text_tokens, "answer_tokens", answer_tokens, f"at most the {text_tokens} of all words")
    return Workload(
        tiles=images * tiles_of_an_image(model),
        map_tokens=images * largest_image(model)[1],
        text_tokens=text_tokens,
        answer_tokens=answer_tokens,
        vision_share=vision_share,
        text_share=text_share if cuts else 1.0,
        cuts=tuple(range(cuts[0], cuts[1] + 1)) if cuts else (),
    )


def longest_workload(model: FocusLlavaConfig, max_length: int) -> Workload:
    """The sample that takes the most memory: images of the largest size, as many as fit, none of their tokens sampled
    away, and words up to the maximum length, half of them answers.

    Raises InvalidInput for a maximum length that no such image fits in.
    """
    visual = largest_image(model)[1]
    images = max_length // visual
    if not images:
        found = f"is {max_length}, expected more than the {visual} visual tokens of one image of the largest size"
        raise InvalidInput(found, field="max_length")
    words = max_length - images * visual
    return image_workload(model, images=images, text_tokens=words, answer_tokens=math.ceil(words / 2))
