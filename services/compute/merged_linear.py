"""Linear layers of one input as one layer, as nano-vllm's QKVParallelLinear and MergedColumnParallelLinear.

They are merged once, when a model is loaded. The layers themselves stay and may be called alone. One product takes
their place where their kind has it: panels are one call of linear.cpp; torch's own layers, as on a GPU, have their
weights end to end in one tensor, for a GPU reads one large weight faster than several. Others multiply one by one.

Legend: M tokens, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from services.compute.onednn_linear import OneDnnLinear
from services.compute.panel_linear import PanelLinear


class MergedLinear:
    """Several layers of one input. It is no module: a model counts the layers where they were."""

    def __init__(self, *layers: nn.Module):
        self.layers = layers
        self._outputs: list[int] = [layer.out_features for layer in layers]  # type: ignore[misc]
        self._panels = [layer for layer in layers if isinstance(layer, PanelLinear)]
        self._panel_weights = [layer.weight_PKNp for layer in self._panels]
        self._panel_biases = [layer.bias for layer in self._panels]
        plain = [layer for layer in layers if type(layer) is nn.Linear]
        has_bias = {layer.bias is not None for layer in plain}
        self.weight_NK = self.bias_N = None
        if len(plain) == len(layers) and len(has_bias) == 1:
            self.weight_NK = _end_to_end(plain, "weight")
            self.bias_N = _end_to_end(plain, "bias") if has_bias == {True} else None

    def __call__(self, x_MK: torch.Tensor, first: int = 0) -> Sequence[torch.Tensor]:
        """[..., K] -> the results [..., N] of the layers from `first` on; they may share memory."""
        outputs = self._outputs[first:]
        if self._in_panels(x_MK):
            return torch.ops.focusllava.linear(x_MK, self._panel_weights[first:], self._panel_biases[first:], outputs)
        if self.weight_NK is not None:
            start = sum(self._outputs[:first])
            bias_N = None if self.bias_N is None else self.bias_N[start:]
            return nn.functional.linear(x_MK, self.weight_NK[start:], bias_N).split(outputs, dim=-1)
        return [layer(x_MK) for layer in self.layers[first:]]

    def _in_panels(self, x_MK: torch.Tensor) -> bool:
        """Whether every layer multiplies so many tokens by its panels."""
        return len(self._panels) == len(self.layers) and all(layer.form(x_MK) is layer for layer in self._panels)


class QkvLinear(MergedLinear):
    """Queries, keys and values of an attention layer."""

    def __init__(self, query: nn.Module, key: nn.Module, value: nn.Module):
        super().__init__(query, key, value)

    def keys_values(self, x_MK: torch.Tensor) -> Sequence[torch.Tensor]:
        """Keys and values alone."""
        return self(x_MK, first=1)


class GateUpLinear(MergedLinear):
    """The two first layers of a gated MLP."""

    def __init__(self, gate: nn.Module, up: nn.Module):
        super().__init__(gate, up)

    def gated(self, x_MK: torch.Tensor, silu_mul_: Callable[[torch.Tensor, torch.Tensor], None]) -> torch.Tensor:
        """silu(gate(x)) * up(x): [..., K] -> [..., N]. silu_mul_ computes silu(a) * b of two results, in place of a."""
        if self._in_panels(x_MK):
            (gate_PKNp, up_PKNp), (gate_N, up_N) = self._panel_weights, self._panel_biases
            return torch.ops.focusllava.linear_gated(x_MK, gate_PKNp, gate_N, up_PKNp, up_N, self._outputs[0])
        gate, up = (_form(layer, x_MK) for layer in self.layers)
        if isinstance(gate, OneDnnLinear) and isinstance(up, OneDnnLinear):
            return up.combined(x_MK, gate.silu(x_MK), "mul")
        gate_MN, up_MN = self(x_MK)
        silu_mul_(gate_MN, up_MN)
        return gate_MN


def add_linear(hidden_MN: torch.Tensor, x_MK: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """hidden + layer(x), added inside the product where its kind can; hidden may be written to."""
    form = _form(layer, x_MK)
    if isinstance(form, PanelLinear):
        torch.ops.focusllava.linear_add_(hidden_MN, x_MK, form.weight_PKNp, form.bias)
        return hidden_MN
    if isinstance(form, OneDnnLinear):
        return form.combined(x_MK, hidden_MN, "add")
    if type(form) is nn.Linear and form.bias is None:
        return hidden_MN.addmm_(x_MK, form.weight.T)
    return hidden_MN.add_(form(x_MK))


def _form(layer: nn.Module, x_MK: torch.Tensor) -> nn.Module:
    """The layer that multiplies so many tokens."""
    return layer.form(x_MK) if isinstance(layer, PanelLinear) else layer


def _end_to_end(layers: Sequence[nn.Linear], name: str) -> torch.Tensor:
    """The layers' weights or biases in one tensor, of which each layer's own becomes a view."""
    parts = [getattr(layer, name) for layer in layers]
    whole = torch.cat(parts).detach()
    for layer, own in zip(layers, whole.split([len(part) for part in parts]), strict=True):
        setattr(layer, name, nn.Parameter(own, requires_grad=False))
    return whole
