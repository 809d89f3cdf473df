"""Cross-entropy of answer tokens, of whose logits only a chunk exists at a time, forward and backward.

Legend: N tokens, R labelled ones of them, C tokens of a chunk, D width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""The label of a token that is in no loss."""
CHUNK = 512
"""Rows of logits that exist at once: at a vocabulary of 128k a float32 tensor of them is 250 MiB."""


def answer_loss_sum(
    hidden_ND: torch.Tensor, labels_N: torch.Tensor, lm_head: nn.Module, chunk: int = CHUNK
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed cross-entropy of the labelled tokens, a float32 scalar, and bool [R]: whether each is the likeliest.

    hidden_ND: what the head reads, N above 0, each token's beside the label of the token that it predicts; labels_N:
    int64, -100 for none; lm_head: the linear layer or what stands in its place (frozen, or with LoRA), called as a
    module, so that ZeRO-3 gathers its weights. Without a label the sum is 0 and has gradients, which are zeros.

    A row without a label costs nothing; on the meta device, where labels cannot be read, every row counts.
    """
    rows_RD, targets_R = hidden_ND, labels_N
    if not labels_N.is_meta:
        place_R = (labels_N != IGNORED).nonzero().squeeze(1)
        rows_RD, targets_R = hidden_ND[place_R], labels_N[place_R]
    rounds = _agreed(-(-len(targets_R) // chunk), lm_head)
    total, right = torch.zeros((), dtype=torch.float32, device=hidden_ND.device), []
    for start in range(0, max(1, rounds) * chunk, chunk):
        chunk_CD, of_chunk_C, weight = rows_RD[start : start + chunk], targets_R[start : start + chunk], 1.0
        if not len(of_chunk_C):  # any row stands in, for the gradients and for the ranks that have one
            chunk_CD, of_chunk_C, weight = hidden_ND[:1], labels_N.new_zeros(1), 0.0
        if torch.is_grad_enabled():
            # With ZeRO-3 a weight's shape at the check may be that of its shard, so shapes are not compared.
            loss, right_C = checkpoint(_chunk, chunk_CD, of_chunk_C, lm_head, use_reentrant=False,
                                       determinism_check="none")  # fmt: skip
        else:
            loss, right_C = _chunk(chunk_CD, of_chunk_C, lm_head)
        total = total + weight * loss
        right.append(right_C)
    return total, torch.cat(right)[: len(targets_R)]


def _chunk(rows_CD: torch.Tensor, targets_C: torch.Tensor, lm_head: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss of one chunk, and bool [C]: whether each target is the likeliest."""
    logits_CV = lm_head(rows_CD).float()
    right_C = logits_CV.detach().argmax(-1) == targets_C
    return nn.functional.cross_entropy(logits_CV, targets_C, reduction="sum"), right_C


def _agreed(rounds: int, lm_head: nn.Module) -> int:
    """The most rounds of any rank where ZeRO-3 shards the head: all ranks gather it as often, or wait for ever."""
    parameters = list(lm_head.parameters())
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return rounds
    most = torch.tensor(rounds, device=parameters[0].device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)
