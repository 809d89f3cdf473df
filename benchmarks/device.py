"""What a benchmark does with the device: it sets the process up, waits, reads clocks and names it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.measure import machine, pin
from services.compute.dtypes import choose_dtype, dtype_name
from services.compute.malloc import keep_freed_memory

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


def set_up(
    options: argparse.Namespace, packages: Sequence[str] = ("torch", "transformers")
) -> tuple[torch.dtype, dict[str, Any]]:
    """Makes this process a replica on the cores of the options; returns the dtype and what every result begins with."""
    pin(options.cores)
    keep_freed_memory()
    torch.set_num_threads(len(options.cores))
    dtype = choose_dtype(options.dtype, options.device)
    return dtype, {
        "machine": machine(options.cores, packages),
        "checkpoint": options.folder.name,
        "device": device_name(options.device),
        "dtype": dtype_name(dtype),
    }
