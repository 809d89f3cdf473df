"""Linear layers whose weight lies in panels of 32 outputs, for the products of linear.cpp.

Decode reads each weight once, at the memory's speed; prefill multiplies from the same bytes. A token's result is the
same bit for bit whatever tokens are beside it, with one exception: on a CPU with matrix units (AMX) oneDNN takes passes
of more than FEW_TOKENS, and may round differently.

Legend: M tokens, N outputs, K inputs, P panels, p inputs of a 32-bit word.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from services.compute.onednn_linear import OneDnnLinear

PANEL = 32
"""Outputs side by side, as in linear.cpp and in what oneDNN makes of a bf16 weight for AMX."""
FEW_TOKENS = 96
"""Most tokens up to which the panels' own kernels are faster than oneDNN's on AMX."""


class PanelLinear(nn.Module):
    """nn.Linear in fp32 or bf16, sums in fp32. No gradient, no parameters, no state dict, as OneDnnLinear."""

    onednn: OneDnnLinear | None

    def __init__(self, linear: nn.Linear, onednn: OneDnnLinear | None = None):
        """onednn: the same layer, if `lies_in_panels`: the weight is kept once, passes of many tokens are oneDNN's."""
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.__dict__["onednn"] = onednn  # no submodule: it is this very layer, and counts once
        panels, p = -(-self.out_features // PANEL), 4 // linear.weight.element_size()
        shape = panels, self.in_features // p, PANEL, p
        if onednn is not None:
            self.weight_PKNp = onednn.memory().view(shape)
        else:
            self.weight_PKNp = linear.weight.detach().new_zeros(shape)
            for panel_KNp, own_KNp in zip(self.weight_PKNp, _panels(linear), strict=True):
                panel_KNp[:, : own_KNp.shape[1]] = own_KNp
        self.bias = None if linear.bias is None else linear.bias.detach().clone()

    def forward(self, x_MK: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N] in the weight's dtype."""
        form = self.form(x_MK)
        if form is not self:
            return form(x_MK)
        return torch.ops.focusllava.linear(x_MK, [self.weight_PKNp], [self.bias], [self.out_features])[0]

    def form(self, x_MK: torch.Tensor) -> PanelLinear | OneDnnLinear:
        """The layer that multiplies so many tokens: this one, or what oneDNN has of it."""
        few = self.onednn is None or x_MK.numel() <= FEW_TOKENS * self.in_features
        return self if few else self.onednn  # type: ignore[return-value]


def lies_in_panels(onednn: OneDnnLinear, linear: nn.Linear) -> bool:
    """Whether oneDNN's layout of the weight, which it promises nobody, is that of the panels."""
    memory = onednn.memory()
    if linear.out_features % PANEL or memory.numel() != linear.weight.numel():
        return False
    panels = zip(memory.chunk(linear.out_features // PANEL), _panels(linear), strict=True)
    return all(torch.equal(memory, panel_KNp.flatten()) for memory, panel_KNp in panels)


def _panels(linear: nn.Linear) -> Iterator[torch.Tensor]:
    """Yields the panels [K / p, up to 32, p] one at a time: a large head must not lie in memory a third time."""
    p = 4 // linear.weight.element_size()
    for rows_NK in linear.weight.detach().split(PANEL):
        yield rows_NK.unflatten(1, (-1, p)).transpose(0, 1)
