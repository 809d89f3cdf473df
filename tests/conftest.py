"""What all tests share: Triton interprets where there is no GPU, and torch computes on one thread."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton. Its kernels are then interpreted, on the CPU's tensors.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="module")
def torch_threads(request: pytest.FixtureRequest) -> None:
    """One, unless a module's TORCH_THREADS says otherwise: threads that wait for each other take longer than what they
    share of tensors as small as the tests'. What splits its work by threads is tested with several."""
    torch.set_num_threads(getattr(request.module, "TORCH_THREADS", 1))
