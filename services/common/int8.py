"""Visual tokens as int8 with a scale for each group of 64 values: half of bfloat16's bytes, for the wire and the cache.

Legend: N visual tokens, D width, G groups of a token, D / 64.

A group's largest magnitude becomes 127, so a value is off by half a step at most: 1/254 of that magnitude. Groups are
short because some channels of a vision-language model's features are tens of times as large as the others: with one
scale for a whole token these alone would take most of the steps.
"""

from __future__ import annotations

import torch

from services.common.errors import InvalidInput

GROUP = 64
"""Values that share a scale."""


def check_width(width: int) -> None:
    """Raises InvalidInput unless groups divide the width of a token."""
    if width % GROUP:
        raise InvalidInput(f"is int8, which needs a width that {GROUP} divides; it is {width}", field="wire_dtype")


def to_int8(values_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [N, D] and float32 scales [N, G] whose product is nearest to the values; on their device.

    D is a multiple of 64. A group that holds NaN or infinity has such a scale, so that whoever looks finds it.
    """
    groups_NGV = values_ND.float().unflatten(-1, (-1, GROUP))
    scales_NG = groups_NGV.abs().amax(-1) / 127
    steps_NG = scales_NG.masked_fill(scales_NG == 0, 1)
    rounded_NGV = (groups_NGV / steps_NG.unsqueeze(-1)).round_().nan_to_num_(0)
    return rounded_NGV.to(torch.int8).flatten(-2), scales_NG


def from_int8(tokens_ND: torch.Tensor, scales_NG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values [N, D] in `dtype`; multiplied in float32 and rounded once."""
    groups_NGV = tokens_ND.unflatten(-1, (-1, GROUP))
    return (groups_NGV * scales_NG.unsqueeze(-1)).to(dtype).flatten(-2)
