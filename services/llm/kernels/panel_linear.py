"""Linear layers whose weight lies in panels of 32 outputs, for the products of linear.cpp.

Decode reads each weight once, at the memory's speed; prefill multiplies from the same bytes. A token's result is the
same bit for bit whatever tokens are beside it, with one exception: on a CPU with matrix units (AMX) oneDNN takes passes
of more than FEW_TOKENS, and may round differently.

Legend: M tokens, N outputs, K inputs, P panels, p inputs of a 32-bit word.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from services.compute.linear import PackedLinear
from services.compute.processor import has_matrix_units, has_panels
from services.llm.kernels import Elementwise

PANEL = 32
"""Outputs side by side, as in linear.cpp and in what oneDNN makes of a bf16 weight for AMX."""
FEW_TOKENS = 96
"""Up to here the panels' own kernels are faster than oneDNN's on AMX."""


class PanelLinear(nn.Module):
    """nn.Linear in fp32 or bf16, sums in fp32. No gradient, no parameters, no state dict, as PackedLinear."""

    packed: PackedLinear | None

    def __init__(self, linear: nn.Linear, packed: PackedLinear | None = None):
        """packed: the same layer, if `lies_in_panels`: the weight is kept once, passes of many tokens are oneDNN's."""
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.__dict__["packed"] = packed  # no submodule: it is this very layer, and counts once
        panels, p = -(-self.out_features // PANEL), 4 // linear.weight.element_size()
        shape = panels, self.in_features // p, PANEL, p
        if packed is not None:
            self.weight_PKNp = packed.memory().view(shape)
        else:
            self.weight_PKNp = linear.weight.detach().new_zeros(shape)
            for panel_KNp, own_KNp in zip(self.weight_PKNp, _panels(linear), strict=True):
                panel_KNp[:, : own_KNp.shape[1]] = own_KNp
        self.bias = None if linear.bias is None else linear.bias.detach().clone()

    def forward(self, x_MK: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N] in the weight's dtype."""
        return linears(x_MK, self)[0]


def lies_in_panels(packed: PackedLinear, linear: nn.Linear) -> bool:
    """Whether oneDNN's layout of the weight, which it promises nobody, is that of the panels."""
    memory = packed.memory()
    if linear.out_features % PANEL or memory.numel() != linear.weight.numel():
        return False
    panels = zip(memory.chunk(linear.out_features // PANEL), _panels(linear), strict=True)
    return all(torch.equal(memory, panel_KNp.flatten()) for memory, panel_KNp in panels)


def pack_linear(linear: nn.Linear) -> nn.Module:
    """The layer in the fastest form that this CPU has for it.

    Panels need AVX2, in bf16 the products of AVX-512. With matrix units (AMX) oneDNN has its part in them, or all.
    """
    bf16 = linear.weight.dtype == torch.bfloat16
    if linear.in_features % 2 or not has_panels(linear.weight.dtype):
        return PackedLinear(linear)
    if not has_matrix_units():
        return PanelLinear(linear)
    packed = PackedLinear(linear)
    return PanelLinear(linear, packed) if bf16 and lies_in_panels(packed, linear) else packed


def linears(x_MK: torch.Tensor, *layers: nn.Module) -> Sequence[torch.Tensor]:
    """Each layer's result on the same input, from one product where their kind allows it; they may share memory."""
    forms = [_form(layer, x_MK) for layer in layers]
    panels = [form for form in forms if isinstance(form, PanelLinear)]
    if len(panels) < len(layers):
        return _one_product(x_MK, forms) or [form(x_MK) for form in forms]
    return torch.ops.focusllava.linear(
        x_MK,
        [layer.weight_PKNp for layer in panels],
        [layer.bias for layer in panels],
        [layer.out_features for layer in panels],
    )


def add_linear(hidden_MN: torch.Tensor, x_MK: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """hidden + layer(x); hidden may be written to."""
    form = _form(layer, x_MK)
    if isinstance(form, PanelLinear):
        torch.ops.focusllava.linear_add_(hidden_MN, x_MK, form.weight_PKNp, form.bias)
        return hidden_MN
    if isinstance(form, PackedLinear):
        return form.combined(x_MK, hidden_MN, "add")
    if type(form) is nn.Linear and form.bias is None:
        return hidden_MN.addmm_(x_MK, form.weight.T)
    return hidden_MN.add_(form(x_MK))


def gated_linear(x_MK: torch.Tensor, gate: nn.Module, up: nn.Module, elementwise: Elementwise) -> torch.Tensor:
    """silu(gate(x)) * up(x): [..., K] -> [..., N]."""
    gate, up = _form(gate, x_MK), _form(up, x_MK)
    if isinstance(gate, PanelLinear) and isinstance(up, PanelLinear):
        return torch.ops.focusllava.linear_gated(
            x_MK, gate.weight_PKNp, gate.bias, up.weight_PKNp, up.bias, gate.out_features
        )
    if isinstance(gate, PackedLinear) and isinstance(up, PackedLinear):
        return up.combined(x_MK, gate.silu(x_MK), "mul")
    gate_MN, up_MN = linears(x_MK, gate, up)
    elementwise.silu_mul_(gate_MN, up_MN)
    return gate_MN


def join_linears(*layers: nn.Linear) -> None:
    """Puts the weights of layers with one input end to end, so that `linears` makes one product of those that are
    neighbours: a GPU reads one large weight faster than several, and is asked less often."""
    for name in ("weight", "bias"):
        parts = [getattr(layer, name) for layer in layers]
        if parts[0] is not None:
            joined = torch.cat(parts).detach()
            for layer, own in zip(layers, joined.split([len(part) for part in parts]), strict=True):
                setattr(layer, name, nn.Parameter(own, requires_grad=False))


def _one_product(x_MK: torch.Tensor, layers: Sequence[nn.Module]) -> Sequence[torch.Tensor] | None:
    """All layers' results, where `join_linears` put their weights end to end in this order."""
    plain = [layer for layer in layers if type(layer) is nn.Linear]
    if len(plain) < len(layers):
        return None
    weights, biases = [layer.weight for layer in plain], [layer.bias for layer in plain]
    outputs = [len(weight) for weight in weights]
    weight_NK = _whole(weights, sum(outputs))
    bias_N = _whole(biases, sum(outputs)) if biases[0] is not None else None
    if weight_NK is None or (bias_N is None and any(bias is not None for bias in biases)):
        return None
    return nn.functional.linear(x_MK, weight_NK, bias_N).split(outputs, dim=-1)


def _whole(parts: Sequence[torch.Tensor], rows: int) -> torch.Tensor | None:
    """The tensor whose rows the parts are, one after another; None where they lie elsewhere."""
    for one, following in itertools.pairwise(parts):
        if following is None or one.data_ptr() + one.nbytes != following.data_ptr():
            return None
        if one.untyped_storage().data_ptr() != following.untyped_storage().data_ptr():
            return None
    return parts[0].as_strided((rows, *parts[0].shape[1:]), parts[0].stride())


def _panels(linear: nn.Linear) -> Iterator[torch.Tensor]:
    """[K / p, up to 32, p] each. One at a time: the head of a large vocabulary must not lie in memory a third time."""
    p = 4 // linear.weight.element_size()
    for rows_NK in linear.weight.detach().split(PANEL):
        yield rows_NK.unflatten(1, (-1, p)).transpose(0, 1)


def _form(layer: nn.Module, x_MK: torch.Tensor) -> nn.Module:
    """What multiplies so many tokens: the layer, or what oneDNN has of it."""
    if not isinstance(layer, PanelLinear) or layer.packed is None or x_MK.numel() <= FEW_TOKENS * layer.in_features:
        return layer
    return layer.packed
