"""Linear layers whose weight lies in panels of 64 outputs, for the products of linear.cpp.

Decode reads each weight once, at the memory's speed; prefill multiplies from the same bytes. A token's result is the
same bit for bit whatever tokens are beside it.

Legend: M tokens, N outputs, K inputs, P panels, p inputs of a 32-bit word.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from services.common.linear import PackedLinear
from services.llm.kernels import native

PANEL = 64
"""Outputs side by side, as in linear.cpp."""


class PanelLinear(nn.Module):
    """nn.Linear in fp32 or bf16, sums in fp32. No gradient, no parameters, no state dict, as PackedLinear."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight_NK = linear.weight.detach()
        self.out_features, self.in_features = weight_NK.shape
        panels, p = -(-self.out_features // PANEL), 4 // weight_NK.element_size()
        self.weight_PKNp = weight_NK.new_zeros(panels, self.in_features // p, PANEL, p)
        # One panel at a time: the head of a large vocabulary must not lie in memory a third time.
        for panel_KNp, rows_NK in zip(self.weight_PKNp, weight_NK.split(PANEL), strict=True):
            panel_KNp[:, : len(rows_NK)] = rows_NK.unflatten(1, (-1, p)).transpose(0, 1)
        self.bias = None if linear.bias is None else linear.bias.detach().clone()

    def forward(self, x_MK: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N] in the weight's dtype."""
        (out_MN,) = torch.ops.focusllava.linear(x_MK, [self.weight_PKNp], [self.bias], [self.out_features])
        return out_MN


def pack_linear(linear: nn.Linear) -> nn.Module:
    """The layer in the fastest form that this CPU has for it.

    Panels need AVX-512, with its bf16 products for bf16. A CPU with matrix units (AMX) keeps oneDNN's kernels, which
    use them.
    """
    bf16 = linear.weight.dtype == torch.bfloat16
    fast = torch.cpu._is_avx512_bf16_supported() if bf16 else torch.cpu._is_avx512_supported()
    if fast and not torch.cpu._is_amx_tile_supported() and linear.in_features % 2 == 0 and native.load():
        return PanelLinear(linear)
    return PackedLinear(linear)


def linears(x_MK: torch.Tensor, *layers: nn.Module) -> Sequence[torch.Tensor]:
    """Each layer's result on the same input, from one call where their kind allows it."""
    panels = [layer for layer in layers if isinstance(layer, PanelLinear)]
    if len(panels) < len(layers):
        return [layer(x_MK) for layer in layers]
    return torch.ops.focusllava.linear(
        x_MK,
        [layer.weight_PKNp for layer in panels],
        [layer.bias for layer in panels],
        [layer.out_features for layer in panels],
    )


def add_linear(hidden_MN: torch.Tensor, x_MK: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """hidden + layer(x); hidden may be written to."""
    if isinstance(layer, PanelLinear):
        torch.ops.focusllava.linear_add_(hidden_MN, x_MK, layer.weight_PKNp, layer.bias)
        return hidden_MN
    if isinstance(layer, PackedLinear):
        return layer.combined(x_MK, hidden_MN, "add")
    return hidden_MN.add_(layer(x_MK))


def gated_linear(x_MK: torch.Tensor, gate: nn.Module, up: nn.Module) -> torch.Tensor:
    """silu(gate(x)) * up(x): [..., K] -> [..., N]."""
    if isinstance(gate, PanelLinear) and isinstance(up, PanelLinear):
        return torch.ops.focusllava.linear_gated(
            x_MK, gate.weight_PKNp, gate.bias, up.weight_PKNp, up.bias, gate.out_features
        )
    if isinstance(gate, PackedLinear) and isinstance(up, PackedLinear):
        return up.combined(x_MK, gate.silu(x_MK), "mul")
    gate_MN = gate(x_MK)
    torch.ops.focusllava.silu_mul_(gate_MN, up(x_MK))
    return gate_MN
