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
