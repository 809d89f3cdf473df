"""Linear layers by oneDNN: the weight is put once into the layout that it multiplies from, in int8 when asked.

Legend: M tokens, N outputs, K inputs. None of the layers below has a gradient. Their weights are no parameters: they
move to no other device and are in no state dict.
"""

from __future__ import annotations

import ctypes
from typing import Literal

import torch
from torch import nn

EXPECTED_TOKENS = 512
"""A hint at M for the layout; the layouts chosen for 16 to 3,000 tokens are equally fast at every M."""


class OneDnnLinear(nn.Module):
    """nn.Linear in fp32 or bf16, sums in fp32. Several layers of one input become one product, outputs side by side."""

    def __init__(self, *linears: nn.Linear):
        super().__init__()
        weights: list[torch.Tensor] = [linear.weight.detach() for linear in linears]
        biases: list[torch.Tensor] = [linear.bias for linear in linears]
        weight_NK = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.out_features, self.in_features = weight_NK.shape
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_NK, EXPECTED_TOKENS)
        self._bias = None if biases[0] is None else torch.cat(biases).detach()
        self._dtype = weight_NK.dtype

    def memory(self) -> torch.Tensor:
        """The weight as it lies in memory, in oneDNN's own order: flat, and there as long as this layer is."""
        address, size = torch.ops.mkldnn.data_ptr(self._weight), torch.ops.mkldnn._nbytes(self._weight)
        return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=self._dtype)

    def forward(self, x_MK: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N] in the weight's dtype."""
        return torch.ops.mkldnn._linear_pointwise(x_MK, self._weight, self._bias, "none", [], "")

    def silu(self, x_MK: torch.Tensor) -> torch.Tensor:
        """silu of `forward`, before it is rounded."""
        return torch.ops.mkldnn._linear_pointwise(x_MK, self._weight, self._bias, "swish", [], "")

    def combined(self, x_MK: torch.Tensor, other_MN: torch.Tensor, operation: Literal["add", "mul"]) -> torch.Tensor:
        """`forward` plus or times another tensor, before it is rounded."""
        return torch.ops.mkldnn._linear_pointwise.binary(x_MK, other_MN, self._weight, self._bias, operation)


class Int8Linear(nn.Module):
    """nn.Linear with int8 weights (one scale an output) and int8 inputs (one scale a token), sums in int32.

    A scale a token, not a batch: what else is in the batch changes no token's result.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight_NK = linear.weight.detach().float()
        self._scale_N = (weight_NK.abs().amax(dim=1) / 127).clamp_min_(torch.finfo(torch.float32).tiny)
        codes_NK = (weight_NK / self._scale_N[:, None]).round_().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(codes_NK, [EXPECTED_TOKENS, self.in_features])
        self._zero_N = torch.zeros(self.out_features, dtype=torch.int32)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x_MK: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N] in the input's dtype."""
        # 126, not 127: the step is rounded to the input's dtype, and no code may leave 0..255.
        step_M1 = x_MK.abs().amax(dim=-1, keepdim=True).clamp_min_(torch.finfo(x_MK.dtype).tiny * 256).div_(126)
        codes_MK = (x_MK / step_M1).round_().add_(128).to(torch.uint8)
        out_MN = torch.ops.onednn.qlinear_pointwise(
            codes_MK, 1.0, 128, self._weight, self._scale_N, self._zero_N, None, 1.0, 0, x_MK.dtype, "none", [], ""
        )
        return out_MN.mul_(step_M1) if self._bias is None else torch.addcmul(self._bias, out_MN, step_M1)
