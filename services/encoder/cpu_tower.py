"""The vision tower and projector of a CPU, frozen, with its weights in oneDNN's own layout.

Queries, keys and values are one product. Residuals and the projector's GELU stay passes of their own: oneDNN can
compute them inside a product, but no sooner. The patch convolution stays one: as a product of oneDNN's it was no faster
either.

Legend: T tiles, N tokens of a tile, C ViT width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from services.compute.onednn_linear import OneDnnLinear
from services.encoder.attention import attend
from services.encoder.model import EncoderModel


class CpuLayer(nn.Module):
    """One encoder layer of CLIP, without gradient."""

    def __init__(self, layer: Any, activation: str):
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.heads, self.scaling = attention.num_heads, attention.scale
        self.layer_norm1, self.layer_norm2 = layer.layer_norm1, layer.layer_norm2
        self.qkv = OneDnnLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out_proj = OneDnnLinear(attention.out_proj)
        self.fc1, self.fc2 = OneDnnLinear(mlp.fc1), OneDnnLinear(mlp.fc2)
        self.activation = quick_gelu_ if activation == "quick_gelu" else mlp.activation_fn

    def forward(self, hidden_TNC: torch.Tensor, attention_mask: None = None) -> torch.Tensor:
        """[T, N, C] -> [T, N, C]."""
        qkv_TN3C = self.qkv(self.layer_norm1(hidden_TNC))
        hidden_TNC = self.out_proj(attend(qkv_TN3C, self.heads, self.scaling)).add_(hidden_TNC)
        return self.fc2(self.activation(self.fc1(self.layer_norm2(hidden_TNC)))).add_(hidden_TNC)


def quick_gelu_(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 * x) in place, by torch's one-pass kernel of softplus' derivative times x."""
    # Past the threshold of 20 the kernel takes the sigmoid to be 1, as it is in fp32.
    return torch.ops.aten.softplus_backward.grad_input(x, x, 1.702, 20.0, grad_input=x)


def prepare_encoder(model: EncoderModel) -> None:
    """Replaces the tower's layers and the projector's: no gradient from here on, their weights in no state dict."""
    model.requires_grad_(False)
    tower: Any = model.vision_tower
    for index, layer in enumerate(tower.encoder.layers):
        tower.encoder.layers[index] = CpuLayer(layer, tower.config.hidden_act)
    projector: Any = model.multi_modal_projector
    projector.linear_1, projector.linear_2 = OneDnnLinear(projector.linear_1), OneDnnLinear(projector.linear_2)
