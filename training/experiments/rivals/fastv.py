"""FastV: after layer 2, only the visual tokens that the last token attends to.

An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language Models,
ECCV 2024 (oral), arXiv 2403.06764.

Where we differ, and why:
- Importance is read with the q/k of the layer that tokens leave before, on the states that enter it. FastV reads the
  layer before that one, whose attention map it has at hand; a fused attention has no map, and the text-guided sampler
  and PyramidDrop read it as we do.
- The softmax is over visual tokens only (`layers.mean_attention`).
- Dropped tokens leave keys, values and positions of the others as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from services.common.errors import InvalidInput
from training.experiments.rivals.base import check_share
from training.experiments.rivals.layers import Asks, Stages, check_asks, check_layers, mean_attention


@dataclass(frozen=True, kw_only=True)
class FastV:
    layer: int = 2
    """K of the paper: layers 0 and 1 see all tokens."""
    keep: float = 0.5
    """1 - R of the paper."""
    asks: Asks = "last_prompt_token"

    def __post_init__(self) -> None:
        check_share(self.keep, "keep")
        check_asks(self.asks)

    @property
    def stages(self) -> Stages:
        return ((self.layer, self.keep),)

    def importance(self, query_THd: torch.Tensor, key_NGd: torch.Tensor, scaling: float) -> torch.Tensor:
        return mean_attention(query_THd, key_NGd, scaling)

    @classmethod
    def at_budget(cls, *, budget: float, layers: int, layer: int = 2, asks: Asks = "last_prompt_token") -> FastV:
        """Keeps so many that the converted share (Sec. 4.4) in an LLM of `layers` layers is the budget.

        Raises InvalidInput when the layers that see all tokens exceed it already.
        """
        check_share(budget)
        check_layers((layer,), layers)
        keep = (budget * layers - layer) / (layers - layer)
        if keep <= 0:
            raise InvalidInput(
                f"is {budget}, fastv at layer {layer} of {layers} needs more than {layer / layers:.3g}", field="budget"
            )
        return cls(layer=layer, keep=keep, asks=asks)
