"""A micro-batch's part of its global batch's loss, and what the log says of it, whatever its sequences are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from services.encoder.model import EncodedImage
from services.modeling.model import FocusLlavaForConditionalGeneration
from services.modeling.packing import TrainedSequence
from services.modeling.pruning import Cut
from training.global_batch import Totals


def part_of_loss(
    model: FocusLlavaForConditionalGeneration,
    sequences: Sequence[TrainedSequence],
    totals: Totals | None,
    *,
    draw: Cut | None,
    vision_sampler: bool,
    balance_weight: float,
    encoded: Sequence[EncodedImage] | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss as `Totals` says, and what `training_step` reports.

    totals: the sums of `counted` over the global batch; None where this micro-batch is the whole of it.
    """
    given: dict[str, Any] = {}
    if totals is not None:
        given["answer_tokens"], chosen_K = totals.counts[0].item(), totals.counts[1:]
        if chosen_K.sum():
            given |= {"regions": chosen_K.sum().item(), "branch_counts": chosen_K}
    loss, found = model.training_step(
        sequences, draw=draw, vision_sampler=vision_sampler, balance_weight=balance_weight, encoded=encoded, **given
    )
    return loss * (totals.micro_batches if totals is not None else 1), found


def counted(
    model: FocusLlavaForConditionalGeneration,
    sequences: Sequence[TrainedSequence],
    *,
    regions: bool,
    encoded: Sequence[EncodedImage] | None = None,
) -> torch.Tensor:
    """float64 [1 + K], on the CPU: answer tokens, and the regions that choose each branch where they are asked for.

    The selector is asked before the step for it: F of Eq. 3 is of the global batch.
    """
    counts = model.count(sequences, vision_sampler=regions, encoded=encoded)
    answers = torch.tensor([counts.answer_tokens], dtype=torch.float64, device="cpu")
    return torch.cat((answers, counts.branch_counts.double()))


def logged(found: dict[str, float], totals: Totals | None) -> dict[str, float]:
    """The log's metrics of what `training_step` reports; losses are parts as `Totals` says, so that their means over
    micro-batches are the global batch's."""
    metrics = {"language": found["answer_loss"]}
    if totals is not None:
        metrics["language"] *= found["answer_tokens"] * totals.micro_batches / totals.counts[0].item()
    if "balance_loss" in found:
        counted = totals is not None and totals.counts[1:].any()
        metrics["balance"] = found["balance_loss"] * (totals.micro_batches if totals is not None and counted else 1)
        metrics |= {k: v / found["regions"] for k, v in found.items() if k.startswith("branch_")}
    if visual := found["visual_tokens"]:
        metrics["sampled_share"] = visual / found["uncompressed_tokens"]
    metrics |= {k: v for k, v in found.items() if k.startswith(("kept_share", "kept_layer_"))}
    return {**metrics, "visual_tokens": visual, "text_tokens": found["text_tokens"]}
