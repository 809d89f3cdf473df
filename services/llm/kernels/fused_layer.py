"""A decoder layer of transformers, its modules' weights used with fewer passes over memory between products.

Legend: S tokens of a packed pass, R of them that go on, n sequences that decode, D width, H/G query/key heads, d head
width, F MLP width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from services.compute.merged_linear import GateUpLinear, QkvLinear, add_linear
from services.compute.panel_linear import PanelLinear
from services.llm.kernels import AttentionStep, Elementwise

FAMILIES = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
"""Layers of one shape: norm, attention, norm, gated MLP, each of the two halves added to what came in."""


def can_fuse(layer: nn.Module) -> bool:
    """Whether `FusedLayer` computes what the layer's own forward does."""
    one: Any = layer
    return type(layer).__name__ in FAMILIES and type(one.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")


class FusedLayer:
    """One decoder layer, made when its linear layers have their final form."""

    def __init__(self, layer: nn.Module, elementwise: Elementwise):
        """layer: one that `can_fuse` takes."""
        one: Any = layer
        attention, mlp = one.self_attn, one.mlp
        self.index: int = attention.layer_idx
        self.qkv = QkvLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up = GateUpLinear(mlp.gate_proj, mlp.up_proj)
        self._output, self._down = attention.o_proj, mlp.down_proj
        self._norm, self._mlp_norm = one.input_layernorm, one.post_attention_layernorm
        self._head_dim, self._scaling, self._elementwise = attention.head_dim, attention.scaling, elementwise
        linears = [*self.qkv.layers, self._output, *self.gate_up.layers, self._down]  # in the order of decode_layer.cpp
        self.decodes_whole = self._norm.eps == self._mlp_norm.eps and all(isinstance(x, PanelLinear) for x in linears)
        """Whether `decode` can be called."""
        if self.decodes_whole:
            self._norms, self._eps = [self._norm.weight, self._mlp_norm.weight], self._norm.eps
            self._weights, self._biases = [x.weight_PKNp for x in linears], [x.bias for x in linears]

    def __call__(
        self,
        hidden_SD: torch.Tensor,
        cos_Sd: torch.Tensor,
        sin_Sd: torch.Tensor,
        step: AttentionStep,
        rows_R: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The layer on a packed pass. hidden_SD may be written to. Returns hidden [S, D], or [R, D] with `rows_R`.

        rows_R: the rows that anyone reads afterwards. Keys and values are computed of all, the rest of these only;
        `step` then gets R queries beside S keys.
        """
        norm_SD = rms_norm(self._norm, hidden_SD, self._elementwise)
        if rows_R is None:
            query_SD, key_SD, value_SD = self.qkv(norm_SD)
        else:
            key_SD, value_SD = self.qkv.keys_values(norm_SD)
            query_SD, hidden_SD = self.qkv.layers[0](norm_SD[rows_R]), hidden_SD[rows_R]
        query_SHd, key_SGd, value_SGd = (t.unflatten(-1, (-1, self._head_dim)) for t in (query_SD, key_SD, value_SD))
        self._elementwise.rotate_(key_SGd, cos_Sd, sin_Sd)
        if rows_R is not None:
            cos_Sd, sin_Sd = cos_Sd[rows_R], sin_Sd[rows_R]
        self._elementwise.rotate_(query_SHd, cos_Sd, sin_Sd)
        out_SHd = step.attend(self.index, query_SHd, key_SGd, value_SGd, self._scaling)
        hidden_SD = add_linear(hidden_SD, out_SHd.flatten(1), self._output)
        norm_SD = rms_norm(self._mlp_norm, hidden_SD, self._elementwise)
        return add_linear(hidden_SD, self.gate_up.gated(norm_SD, self._elementwise.silu_mul_), self._down)

    def decode(self, hidden_nD: torch.Tensor, cos_nd: torch.Tensor, sin_nd: torch.Tensor, *pages: torch.Tensor) -> None:
        """The layer on one token of each of n sequences, in one call of compiled code. hidden_nD is written to.

        pages: what `PackedStep.pages` returns for this layer."""
        torch.ops.focusllava.decode_layer_(
            hidden_nD, cos_nd, sin_nd, self._norms, self._eps, self._weights, self._biases, *pages, self._scaling
        )


def rms_norm(norm: Any, hidden_SD: torch.Tensor, elementwise: Elementwise) -> torch.Tensor:
    """What the norm module computes."""
    return elementwise.rms_norm(hidden_SD, norm.weight, norm.eps)


def fuse_norms(module: nn.Module) -> None:
    """torch's fused RMS norm in place of the decoders' own: equal in fp32, one rounding fewer in bf16."""
    child: Any
    for name, child in module.named_children():
        if type(child).__name__ in ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm"):
            fused = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon, device="meta")
            fused.weight = child.weight
            setattr(module, name, fused)
        else:
            fuse_norms(child)
