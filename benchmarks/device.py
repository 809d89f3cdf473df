"""Clocks that wait for the device, and its name."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

GPU_CALLS = 10
"""Calls that one reading on a GPU covers: a single kernel may be shorter than its launch and the wait for it."""


def wait(device: torch.device | str) -> None:
    """Waits until the device has done all that was asked of it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], device: torch.device | str) -> float:
    """Seconds of a call; on a GPU the mean of GPU_CALLS, launched one after another as an engine's step does."""
    calls = GPU_CALLS if torch.device(device).type == "cuda" else 1
    wait(device)
    began = time.perf_counter()
    for _ in range(calls):
        call()
    wait(device)
    return (time.perf_counter() - began) / calls


def device_name(device: str) -> str:
    """ "cpu", or the GPU's own name."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device
