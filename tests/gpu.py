"""The GPU's kernels for tests: the real ones where there is a GPU, else interpreted by Triton on the CPU."""

from __future__ import annotations

import pytest
import torch

from services.llm.kernels import Elementwise, Kernels
from tests.attention_oracle import varlen_oracle

NO_TRITON = "Triton is not installed; `make test` does it"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
"""What the kernels are tested in: Triton interprets no bf16 products, and a GPU gets no fp32."""
TOLERANCE = {"rtol": 1e-2, "atol": 1e-2} if DEVICE.type == "cuda" else {"rtol": 1e-5, "atol": 1e-5}


def kernels() -> Kernels:
    pytest.importorskip("triton", reason=NO_TRITON)
    from services.llm.kernels.cuda_attention import CudaKernels, cuda_kernels

    return cuda_kernels(DEVICE) if DEVICE.type == "cuda" else CudaKernels(varlen_oracle)


def elementwise() -> Elementwise:
    pytest.importorskip("triton", reason=NO_TRITON)
    from services.llm.kernels import cuda_elementwise

    return cuda_elementwise
