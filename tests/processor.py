"""What this machine's processor has, for tests of what only some processors can do."""

from __future__ import annotations

import shutil

import pytest
import torch

from services.compute import native
from services.compute.linear import onednn_multiplies
from services.compute.processor import has_int8_linear
from services.llm.kernels.cpu_attention import CpuKernels

ONEDNN_DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if onednn_multiplies(torch.device("cpu"), dtype)]
"""The dtypes that oneDNN multiplies in."""
needs_bf16 = pytest.mark.skipif(torch.bfloat16 not in ONEDNN_DTYPES, reason="oneDNN has no bf16 on this processor")
needs_vnni = pytest.mark.skipif(not has_int8_linear(), reason="this processor has no AVX-512 VNNI")


def _has_compiler() -> bool:
    try:
        return shutil.which(native._compiler()[0]) is not None
    except native.CannotBuild:
        return False


HAS_COMPILER = _has_compiler()
"""Whether a compiler is here; then the compiled operators are to be there."""
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="this machine has no C++ compiler")


def cpu_kernels() -> CpuKernels:
    if not HAS_COMPILER:
        pytest.skip("this machine has no C++ compiler")
    return CpuKernels()
