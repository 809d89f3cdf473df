"""The dtype that a model runs in, named or the one that its device multiplies fastest in; what its values may be."""

from __future__ import annotations

import math
from typing import Literal

import torch

from services.compute.processor import cpu_has_bfloat16

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def choose_dtype(name: str, device: str | torch.device) -> torch.dtype:
    """The dtype of that name, one of `Dtype`. "auto" is bfloat16 on a device that multiplies in it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    on_cpu = torch.device(device).type == "cpu"
    return torch.bfloat16 if (cpu_has_bfloat16() if on_cpu else gpu_has_bfloat16()) else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name in a configuration: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def dtype_of_stored(name: str, device: str | torch.device) -> torch.dtype:
    """The dtype that weights are stored in; float32 instead on a CPU that does not multiply in it."""
    stored: torch.dtype = getattr(torch, name)
    on_cpu = torch.device(device).type == "cpu"
    return torch.float32 if on_cpu and stored != choose_dtype("auto", device) else stored


def gpu_has_bfloat16() -> bool:
    """Whether this machine's GPUs multiply in bfloat16, as NVIDIA's do since Ampere; True where there is none."""
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. The tensor has a floating dtype and one value or more."""
    # aminmax passes NaN on, and makes no tensor of the same size; isfinite().all() makes three.
    return all(math.isfinite(bound) for bound in tensor.aminmax())
