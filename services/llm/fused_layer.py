"""A decoder layer of transformers on a CPU, its modules' weights used with fewer passes over memory between products.

Legend: S tokens of a packed pass, R of them that go on, D width, H/G query/key heads, d head width, F MLP width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from services.llm.attention import AttentionStep

FAMILIES = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
"""Layers of one shape: norm, attention, norm, gated MLP, each of the two halves added to what came in."""


def can_fuse(layer: nn.Module) -> bool:
    """Whether `fused_layer` computes what the layer's own forward does."""
    one: Any = layer
    return type(layer).__name__ in FAMILIES and type(one.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")


def fused_layer(
    layer: nn.Module,
    hidden_SD: torch.Tensor,
    cos_Sd: torch.Tensor,
    sin_Sd: torch.Tensor,
    step: AttentionStep,
    rows_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """One layer on a packed pass. hidden_SD may be written to. Returns hidden [S, D], or [R, D] with `rows_R`.

    rows_R: the rows that anyone reads afterwards. Keys and values are computed of all, the rest of these only; `step`
    then gets R queries beside S keys.
    """
    one: Any = layer
    ops, attention, mlp = torch.ops.focusllava, one.self_attn, one.mlp
    norm_SD = _norm(one.input_layernorm, hidden_SD)
    key_SGd = attention.k_proj(norm_SD).unflatten(-1, (-1, attention.head_dim))
    value_SGd = attention.v_proj(norm_SD).unflatten(-1, (-1, attention.head_dim))
    ops.rotate_(key_SGd, cos_Sd, sin_Sd)
    if rows_R is not None:
        norm_SD, hidden_SD, cos_Sd, sin_Sd = norm_SD[rows_R], hidden_SD[rows_R], cos_Sd[rows_R], sin_Sd[rows_R]
    query_SHd = attention.q_proj(norm_SD).unflatten(-1, (-1, attention.head_dim))
    ops.rotate_(query_SHd, cos_Sd, sin_Sd)
    query_HSd, key_GSd, value_GSd = (tensor.transpose(0, 1) for tensor in (query_SHd, key_SGd, value_SGd))
    out_SHd = step.attend(attention.layer_idx, query_HSd, key_GSd, value_GSd, attention.scaling)
    norm_SD = _norm(one.post_attention_layernorm, hidden_SD, attention.o_proj(out_SHd.flatten(1)))
    gate_SF = mlp.gate_proj(norm_SD)
    ops.silu_mul_(gate_SF, mlp.up_proj(norm_SD))
    return hidden_SD.add_(mlp.down_proj(gate_SF))


def _norm(norm: Any, hidden_SD: torch.Tensor, delta_SD: torch.Tensor | None = None) -> torch.Tensor:
    """Adds delta to hidden in place, then normalises."""
    return torch.ops.focusllava.add_rms_norm(hidden_SD, delta_SD, norm.weight, norm.eps)
