"""What DeepSpeed is told: parameter groups, ZeRO, and the learning rate of each step.

The rates are set by the loop from the step alone, so a resumed run has the same ones.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from services.common.errors import InvalidInput
from training.config import OptimizerConfig, RunConfig

SELECTOR, TOWER, PROJECTOR, LANGUAGE_MODEL = "selector", "vision_tower", "projector", "language_model"
PART_OF = {
    "selector": SELECTOR,
    "vision_guided_sampler": SELECTOR,
    "vision_tower": TOWER,
    "multi_modal_projector": PROJECTOR,
    "image_newline": PROJECTOR,
}
"""The part of the model by a component of a parameter's name; what names none of them is the language model's."""


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    return next((PART_OF[word] for word in name.split(".") if word in PART_OF), LANGUAGE_MODEL)


def parameter_groups(module: nn.Module, run: RunConfig) -> list[dict[str, Any]]:
    """Every parameter that is trained in exactly one group. Works on any device, meta too, and freezes what is frozen.

    Weights decay, norms and biases do not; every part of the model has a learning rate of its own. A group's `part` is
    one of "language_model", "projector", "vision_tower" and "selector", its `top_rate` the learning rate after the
    warm-up, its `learns_for` the steps after which it rests, 0 for never.

    Raises InvalidInput for a frozen prefix that no parameter has, and where nothing is left to train.
    """
    optimizer = run.optimizer
    scales = {
        SELECTOR: optimizer.selector_lr_scale,
        TOWER: optimizer.vision_lr_scale,
        PROJECTOR: optimizer.projector_lr_scale,
    }
    # A stage's module holds the model as `model`.
    named = [(name.removeprefix("model."), parameter) for name, parameter in module.named_parameters()]
    for prefix in optimizer.frozen:
        if not any(name.startswith(prefix) for name, _ in named):
            raise InvalidInput(f"no parameter's name starts with {prefix!r}", field="optimizer.frozen")
    groups: dict[tuple[int, str, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        if name.startswith(optimizer.frozen):
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            rests = [optimizer.selector_steps] * (part_of(name) == SELECTOR)
            rests += [optimizer.encoder_steps] * ("encoder" in name.split("."))
            learns_for = min((steps for steps in rests if steps), default=0)
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves a worker a flat part
            groups.setdefault((learns_for, part_of(name), len(shape) > 1), []).append(parameter)
    if not groups:
        raise InvalidInput(f"is {list(optimizer.frozen)}, which leaves nothing to train", field="optimizer.frozen")
    return [
        {
            "params": parameters,
            "lr": (rate := optimizer.learning_rate * scales.get(part, 1.0)),
            "top_rate": rate,
            "part": part,
            "weight_decay": optimizer.weight_decay if decays else 0.0,
            "learns_for": learns_for,
        }
        for (learns_for, part, decays), parameters in groups.items()
    ]


def deepspeed_config(run: RunConfig, dtype: torch.dtype, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's own configuration of the run."""
    optimizer, cluster = run.optimizer, run.cluster
    zero: dict[str, Any] = {"stage": cluster.zero_stage, "overlap_comm": cluster.use_gpu}
    if cluster.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cluster.use_gpu}
    if cluster.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": cluster.use_gpu}
    return {
        "train_micro_batch_size_per_gpu": run.samples_per_worker,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.clip_norm,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": zero,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimizer.learning_rate,
                "betas": list(optimizer.betas),
                "weight_decay": optimizer.weight_decay,
                "torch_adam": not cluster.use_gpu,
            },
        },
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
    }


def warmup_steps(optimizer: OptimizerConfig, steps: int) -> int:
    """Steps of the warm-up in a run of `steps`."""
    share = optimizer.warmup_share
    return max(2, optimizer.warmup_steps if share is None else math.ceil(share * steps))


def share_of_rate(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """Share of its learning rate that each group has in a step, counted from 0."""
    warmup = warmup_steps(optimizer, steps)
    if step == 0:
        return 0.0
    if step < warmup:
        # DeepSpeed's WarmupCosineLR, from a hundredth of the rate on.
        logarithmic = 0.01 + 0.99 * math.log(step) / math.log(warmup)
        return logarithmic if optimizer.warmup == "logarithmic" else step / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return optimizer.floor + (1 - optimizer.floor) * (1 + math.cos(math.pi * progress)) / 2


def rate_before_rest(step: int, learns_for: int, cooldown: int) -> float:
    """Share of its learning rate in this step, counted from 0, of a part that rests after `learns_for` steps."""
    if not learns_for:
        return 1.0
    left = max(0, learns_for - step)
    return min(1.0, left / max(1, cooldown))


def set_rates(groups: list[dict[str, Any]], run: RunConfig, step: int) -> dict[str, float]:
    """Sets the learning rates of a step; returns the highest of each part."""
    share = share_of_rate(run.optimizer, step, run.steps)
    rates: dict[str, float] = {}
    for group in groups:
        # At rest momentum alone would carry a part on.
        rest = rate_before_rest(step, group["learns_for"], run.optimizer.rest_cooldown)
        group["lr"] = group["top_rate"] * share * rest
        rates[group["part"]] = max(rates.get(group["part"], 0.0), group["lr"])
    return rates
