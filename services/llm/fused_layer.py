"""A decoder layer of transformers, its modules' weights used with fewer passes over memory between products.

Legend: S tokens of a packed pass, R of them that go on, D width, H/G query/key heads, d head width, F MLP width.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import nn

from services.llm.attention import AttentionStep, PackedStep
from services.llm.kernels import Elementwise
from services.llm.kernels.cpu import CpuKernels
from services.llm.kernels.panel_linear import FEW_TOKENS, PanelLinear, add_linear, gated_linear, join_linears, linears

FAMILIES = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
"""Layers of one shape: norm, attention, norm, gated MLP, each of the two halves added to what came in."""


def can_fuse(layer: nn.Module) -> bool:
    """Whether `fused_layer` computes what the layer's own forward does."""
    one: Any = layer
    return type(layer).__name__ in FAMILIES and type(one.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")


def join_plain_linears(layer: nn.Module) -> None:
    """Joins queries, keys and values, and gate and up, where they are torch's own layers, as on a GPU."""
    one: Any = layer
    attention, mlp = one.self_attn, one.mlp
    for group in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
        if all(type(linear) is nn.Linear for linear in group):
            join_linears(*group)


def fused_layer(
    layer: nn.Module,
    hidden_SD: torch.Tensor,
    cos_Sd: torch.Tensor,
    sin_Sd: torch.Tensor,
    step: AttentionStep,
    elementwise: Elementwise,
    rows_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """One layer on a packed pass. hidden_SD may be written to. Returns hidden [S, D], or [R, D] with `rows_R`.

    rows_R: the rows that anyone reads afterwards. Keys and values are computed of all, the rest of these only; `step`
    then gets R queries beside S keys.
    """
    one: Any = layer
    attention, mlp = one.self_attn, one.mlp
    norm_SD = rms_norm(one.input_layernorm, hidden_SD, elementwise)
    if rows_R is None:
        query_SD, key_SD, value_SD = linears(norm_SD, attention.q_proj, attention.k_proj, attention.v_proj)
    else:
        key_SD, value_SD = linears(norm_SD, attention.k_proj, attention.v_proj)
        query_SD, hidden_SD = attention.q_proj(norm_SD[rows_R]), hidden_SD[rows_R]
    query_SHd, key_SGd, value_SGd = (t.unflatten(-1, (-1, attention.head_dim)) for t in (query_SD, key_SD, value_SD))
    elementwise.rotate_(key_SGd, cos_Sd, sin_Sd)
    if rows_R is not None:
        cos_Sd, sin_Sd = cos_Sd[rows_R], sin_Sd[rows_R]
    elementwise.rotate_(query_SHd, cos_Sd, sin_Sd)
    out_SHd = step.attend(attention.layer_idx, query_SHd, key_SGd, value_SGd, attention.scaling)
    hidden_SD = add_linear(hidden_SD, out_SHd.flatten(1), attention.o_proj)
    norm_SD = rms_norm(one.post_attention_layernorm, hidden_SD, elementwise)
    return add_linear(hidden_SD, gated_linear(norm_SD, mlp.gate_proj, mlp.up_proj, elementwise), mlp.down_proj)


class DecodeLayer:
    """`fused_layer` for steps that only decode, on a CPU, in one call of compiled code."""

    def __init__(self, layer: nn.Module):
        """layer: one of `decodes_whole`."""
        one: Any = layer
        linears, norms = _linears(one), (one.input_layernorm, one.post_attention_layernorm)
        self._index, self._scaling = one.self_attn.layer_idx, one.self_attn.scaling
        self._weights = [norm.weight for norm in norms], norms[0].eps, [linear.weight_PKNp for linear in linears]
        self._biases = [linear.bias for linear in linears]

    def __call__(self, hidden_nD: torch.Tensor, cos_nd: torch.Tensor, sin_nd: torch.Tensor, step: PackedStep) -> None:
        """hidden_nD is written to."""
        torch.ops.focusllava.decode_layer_(
            hidden_nD, cos_nd, sin_nd, *self._weights, self._biases, *step.pages(self._index), self._scaling
        )


def decodes_whole(layer: nn.Module) -> bool:
    """Whether `DecodeLayer` computes what `fused_layer` does."""
    one: Any = layer
    same_eps = one.input_layernorm.eps == one.post_attention_layernorm.eps
    return same_eps and all(isinstance(linear, PanelLinear) for linear in _linears(one))


def _linears(layer: Any) -> list[Any]:
    """A layer's linears in the order of decode_layer.cpp."""
    attention, mlp = layer.self_attn, layer.mlp
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            mlp.gate_proj, mlp.up_proj, mlp.down_proj]  # fmt: skip


def only_decodes(step: AttentionStep) -> TypeGuard[PackedStep]:
    """Whether `DecodeLayer` takes the step: no prefill, and no more tokens than the panels' own products are for."""
    return (
        isinstance(step, PackedStep)
        and isinstance(step.kernels, CpuKernels)
        and not step.query_lens
        and step.decoding <= FEW_TOKENS
    )


def rms_norm(norm: Any, hidden_SD: torch.Tensor, elementwise: Elementwise) -> torch.Tensor:
    """The module's result."""
    return elementwise.rms_norm(hidden_SD, norm.weight, norm.eps)
