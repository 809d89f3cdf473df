"""Text-guided sampler: which visual tokens does the instruction attend to? (Sec. 3.3, Eq. 6-9)

Legend: T instruction tokens, N visual tokens, H query heads, G key heads (grouped-query attention), d head width,
R = T * H / G queries that share a key head.
"""

from __future__ import annotations

import math

import torch

from services.common.types import SamplerSettings


def apply_rotary(x_THd: torch.Tensor, cos_Td: torch.Tensor, sin_Td: torch.Tensor) -> torch.Tensor:
    """Rotary embedding as the Llama, Mistral and Qwen2 decoders apply it: halves rotated, one angle a position."""
    first, second = x_THd.chunk(2, dim=-1)
    return x_THd * cos_Td.unsqueeze(-2) + torch.cat((-second, first), dim=-1) * sin_Td.unsqueeze(-2)


def text_importance(query_THd: torch.Tensor, key_NGd: torch.Tensor, scaling: float) -> torch.Tensor:
    """Eq. 6-8: S_j = (1/T) sum_t max_h softmax_j(q_th . k_jh * scaling), the softmax over the visual tokens in float32.

    Both inputs carry their rotary embedding already. Only this T x N block is ever computed. Returns float32 [N].
    """
    tokens, heads, width = query_THd.shape
    groups = key_NGd.shape[1]
    # One product a group: its heads' queries one after the other, so that shared keys are not copied.
    query_GRd = query_THd.float().transpose(0, 1).reshape(groups, -1, width)
    scores_GRN = torch.bmm(query_GRd, key_NGd.float().permute(1, 2, 0)) * scaling
    return scores_GRN.softmax(dim=-1).view(heads, tokens, -1).amax(dim=0).mean(dim=0)


def keep_by_share(importance_N: torch.Tensor, threshold: float) -> torch.Tensor:
    """Eq. 9: the fewest tokens, most important first, whose share of the summed importance reaches `threshold`.

    Ties go to the earlier token. Returns ascending int64 indices [K], K >= 1; 1.0 keeps all.
    """
    count = importance_N.numel()
    if threshold >= 1.0 or count == 0:
        return torch.arange(count, device=importance_N.device)
    sorted_N, order_N = importance_N.double().sort(descending=True, stable=True)
    cumulative_N = sorted_N.cumsum(0)
    kept = int((cumulative_N < threshold * cumulative_N[-1]).sum()) + 1
    return order_N[: min(kept, count)].sort().values


def kept_by_ratio(count: int, ratio: float) -> int:
    """ceil(ratio * count), at least 1 of 1 or more."""
    # Rounded first: 0.1 * 30 is a little more than 3 in floating point.
    return min(max(math.ceil(round(ratio * count, 6)), 1), count)


def keep_by_ratio(importance_N: torch.Tensor, ratio: float) -> torch.Tensor:
    """The ceil(ratio * N) most important tokens, for a fixed budget in place of Eq. 9; ties go to the earlier token.

    Returns ascending int64 indices [K], K >= 1 where there are tokens.
    """
    kept = kept_by_ratio(importance_N.numel(), ratio)
    return importance_N.argsort(descending=True, stable=True)[:kept].sort().values


def keep(importance_N: torch.Tensor, settings: SamplerSettings) -> torch.Tensor:
    """The visual tokens that go on as `settings` say, of whose threshold and keep_ratio one is set: ascending int64."""
    if settings.keep_ratio is not None:
        return keep_by_ratio(importance_N, settings.keep_ratio)
    assert settings.threshold is not None
    return keep_by_share(importance_N, settings.threshold)


def keeps_all(settings: SamplerSettings) -> bool:
    """Whether every visual token goes on, whatever their importance."""
    return (settings.threshold if settings.keep_ratio is None else settings.keep_ratio) == 1


def sure_to_leave(count: int, settings: SamplerSettings) -> int:
    """How many of `count` visual tokens `keep` leaves out, whatever their importance."""
    return 0 if settings.keep_ratio is None else count - kept_by_ratio(count, settings.keep_ratio)
