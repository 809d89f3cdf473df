"""Losses that keep the vision-guided sampler's branches in use (Eq. 3-5 and Eq. 10)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def balance_loss(probs_MK: torch.Tensor, coefficients: Sequence[float] | None = None) -> torch.Tensor:
    """K * sum_k c_k F_k P_k, without the weight alpha; a float32 scalar, 1.0 when the branches are used evenly.

    F_k is the share of regions that choose branch k, P_k its mean probability; the gradient flows through P_k only.
    `coefficients` c are rescaled to sum to K (Eq. 10); None is the balance loss of Eq. 3. A dearer branch is used less.
    """
    probs_MK = probs_MK.float()
    branches = probs_MK.shape[1]
    chosen_MK = torch.nn.functional.one_hot(probs_MK.argmax(dim=1), branches).float()
    product_K = chosen_MK.mean(dim=0) * probs_MK.mean(dim=0)
    if coefficients is not None:
        weight_K = product_K.new_tensor(list(coefficients))
        product_K = product_K * weight_K * (branches / weight_K.sum())
    return branches * product_K.sum()


def balance_loss_sum(
    probs_MK: torch.Tensor, counts_K: torch.Tensor, regions: float, coefficients: Sequence[float]
) -> torch.Tensor:
    """A micro-batch's part of the balance loss of its global batch; the parts of all add up to `balance_loss`.

    counts_K: regions of the global batch that choose each branch; regions: all of them.
    """
    weight_K = torch.tensor(list(coefficients), dtype=torch.float32, device=probs_MK.device)
    weight_K = weight_K * (len(weight_K) / weight_K.sum())
    return len(weight_K) * (weight_K * counts_K.float() / regions * probs_MK.float().sum(dim=0) / regions).sum()
