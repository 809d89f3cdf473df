"""Gives each linear layer of a model the form that multiplies fastest on its device, in int8 when asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from services.common.errors import InvalidInput
from services.compute.onednn_linear import Int8Linear, OneDnnLinear
from services.compute.panel_linear import PanelLinear, lies_in_panels
from services.compute.processor import has_int8_linear, has_matrix_units, has_onednn_linear, has_panels

Quantize = Literal["int8"]


def prepare_linears(causal_lm: nn.Module, device: torch.device, dtype: torch.dtype, quantize: Quantize | None) -> None:
    """Replaces every nn.Linear that has a faster form on this device, converted to `dtype` one at a time.

    quantize "int8" takes those of the decoder layers; the head that makes logits keeps its precision. Raises
    InvalidInput where int8 cannot run.
    """
    if quantize is not None:
        if quantize != "int8":
            raise InvalidInput(f'is {quantize!r}, expected "int8" or nothing', field="quantize")
        if not onednn_multiplies(device, dtype) or not has_int8_linear():
            raise InvalidInput(
                f"is {quantize!r}: needs a CPU with AVX-512 VNNI and float32 or bfloat16, this is {device}, {dtype}",
                field="quantize",
            )
        _replace(causal_lm.get_submodule("model.layers"), lambda linear: Int8Linear(linear.to(dtype)))
    if onednn_multiplies(device, dtype):
        _replace(causal_lm, lambda linear: fastest_linear(linear.to(dtype)))


def linear_parameters(module: nn.Module) -> set[str]:
    """Names of the parameters that `prepare_linears` takes."""
    return {
        f"{name}.{parameter}"
        for name, child in module.named_modules()
        if type(child) is nn.Linear
        for parameter, _ in child.named_parameters()
    }


def onednn_multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies in this dtype on this device."""
    return device.type == "cpu" and has_onednn_linear(dtype)


def fastest_linear(linear: nn.Linear) -> nn.Module:
    """The layer in the fastest form that this CPU has for it.

    Panels need AVX2, in bf16 the products of AVX-512. With matrix units (AMX) oneDNN has its part in them, or all.
    """
    if linear.in_features % 2 or not has_panels(linear.weight.dtype):
        return OneDnnLinear(linear)
    if not has_matrix_units():
        return PanelLinear(linear)
    onednn = OneDnnLinear(linear)
    bf16 = linear.weight.dtype == torch.bfloat16
    return PanelLinear(linear, onednn) if bf16 and lies_in_panels(onednn, linear) else onednn


def _replace(module: nn.Module, made: Callable[[nn.Linear], nn.Module]) -> None:
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:
            setattr(module, name, made(child))
        else:
            _replace(child, made)
