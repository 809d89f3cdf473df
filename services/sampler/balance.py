"""Losses that keep the vision-guided sampler's branches in use (Eq. 3-5 and Eq. 10)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def chosen_branches(probs_MK: torch.Tensor) -> torch.Tensor:
    """int64 [K]: the regions that choose each branch."""
    return torch.bincount(probs_MK.argmax(dim=1), minlength=probs_MK.shape[1])


def balance_loss(probs_MK: torch.Tensor, coefficients: Sequence[float] | None = None, *,
                 counts_K: torch.Tensor | None = None, regions: float | None = None) -> torch.Tensor:  # fmt: skip
    """K * sum_k c_k F_k P_k, without the weight alpha; a float32 scalar, 1.0 when the branches are used evenly.

    F_k is the share of regions that choose branch k, P_k its mean probability; the gradient flows through P_k only.
    `coefficients` c are rescaled to sum to K (Eq. 10); None is the balance loss of Eq. 3. A dearer branch is used less.

    counts_K, regions: `chosen_branches` and regions of the global batch that these regions are a part of; the losses of
    all its parts then add up to its own.
    """
    counts_K = chosen_branches(probs_MK) if counts_K is None else counts_K.to(probs_MK.device)
    regions = len(probs_MK) if regions is None else regions
    product_K = counts_K.float() / regions * probs_MK.float().sum(dim=0) / regions
    if coefficients is not None:
        weight_K = product_K.new_tensor(list(coefficients))
        product_K = product_K * weight_K * (len(weight_K) / weight_K.sum())
    return len(product_K) * product_K.sum()
