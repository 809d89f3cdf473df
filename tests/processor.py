"""What this machine's processor has, for tests of what only some processors can do."""

from __future__ import annotations

import pytest
import torch

from services.common.linear import can_pack

PACKED_DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if can_pack(torch.device("cpu"), dtype)]
"""Those that oneDNN multiplies in."""
needs_bf16 = pytest.mark.skipif(torch.bfloat16 not in PACKED_DTYPES, reason="oneDNN has no bf16 on this processor")
needs_vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this processor has no AVX-512 VNNI")
