"""PyramidDrop: a share of the visual tokens leaves after each quarter of the layers.

PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction, CVPR 2025, arXiv
2410.17247.

With 32 layers tokens leave before layers 8, 16 and 24, and half of them stay each time.

Where we differ, and why:
- The paper asks the last instruction token, and so do we; the authors' code asks the last token of the prompt, the chat
  template's own (`asks="last_prompt_token"`). In training it averages over all turns; here each turn is a branch.
- Kept tokens keep their positions; the authors' code counts them anew, which moves the text closer to the image at each
  stage. Counts are rounded up, theirs down.
- The softmax is over visual tokens only (`layers.mean_attention`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from services.common.errors import InvalidInput
from training.experiments.rivals.base import check_share
from training.experiments.rivals.layers import Asks, Stages, check_asks, check_layers, converted_share, mean_attention


@dataclass(frozen=True, kw_only=True)
class PyramidDrop:
    layers: tuple[int, ...] = (8, 16, 24)
    ratio: float = 0.5
    """lambda of the paper: what each stage keeps of what the one before it left."""
    asks: Asks = "last_instruction_token"

    def __post_init__(self) -> None:
        check_share(self.ratio, "ratio")
        check_asks(self.asks)

    @property
    def stages(self) -> Stages:
        return tuple((layer, self.ratio**power) for power, layer in enumerate(self.layers, start=1))

    def importance(self, query_THd: torch.Tensor, key_NGd: torch.Tensor, scaling: float) -> torch.Tensor:
        return mean_attention(query_THd, key_NGd, scaling)

    @classmethod
    def at_budget(cls, *, budget: float, layers: int, stage_layers: tuple[int, ...] | None = None,
                  asks: Asks = "last_instruction_token") -> PyramidDrop:  # fmt: skip
        """The ratio at which the converted share (Sec. 4.4) in an LLM of `layers` layers is the budget.

        stage_layers: None puts a stage at each quarter. Raises InvalidInput when the layers that see all tokens
        exceed the budget already.
        """
        check_share(budget)
        # An LLM of fewer than four layers has fewer quarters.
        found = stage_layers or tuple(sorted({layers * quarter // 4 for quarter in (1, 2, 3)} - {0}))
        check_layers(found, layers)
        if budget <= found[0] / layers:
            raise InvalidInput(
                f"is {budget}, pyramid_drop from layer {found[0]} of {layers} needs more than {found[0] / layers:.3g}",
                field="budget",
            )
        low, high = 0.0, 1.0
        # The share grows with the ratio: halve the interval until a float has no more digits.
        for _ in range(60):
            middle = (low + high) / 2
            reached = converted_share(cls(layers=found, ratio=middle).stages, layers)
            low, high = (middle, high) if reached < budget else (low, middle)
        return cls(layers=found, ratio=high, asks=asks)
