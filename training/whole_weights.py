"""Whole weights where ZeRO-3 has left each worker a part of every one. Called by all workers at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def whole(parameters: Iterable[nn.Parameter]) -> Iterator[bool]:
    """The parameters are whole within this block, on every worker; the value is whether this is the first worker."""
    parts = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    with contextlib.ExitStack() as stack:
        if parts:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(parts))
        yield not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def exported_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors by name, with its adapters added to the weights that they stand beside: on the first worker.

    Each is whole only until the next is asked for, so that a worker holds one beside its parts. All workers have to
    read to the end; to the others nothing comes.
    """
    beside = {}
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            beside[f"{name}.base_layer.weight"] = module
    for name, tensor in model.state_dict(keep_vars=True).items():
        if ".lora_" in name:
            continue
        layer: Any = beside.get(name)  # PEFT's, whose method `get_delta_weight` its base class has not
        with torch.no_grad(), whole(layer.parameters() if layer else [tensor]) as first:
            if first:
                own = tensor.detach()
                yield name.replace(".base_layer.", "."), own + layer.get_delta_weight("default") if layer else own
