"""Visual tokens in int8: how near the values stay, and that what is not finite stays so."""

from __future__ import annotations

import pytest
import torch

from services.common.errors import InvalidInput
from services.common.int8 import GROUP, check_width, from_int8, to_int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_value_is_off_by_half_a_step_at_most(dtype):
    values_ND = torch.randn(7, 4 * GROUP, generator=torch.Generator().manual_seed(0))
    values_ND[:, 5] *= 50  # a channel as large as those of vision-language models
    values_ND[2, :GROUP] = 0
    values_ND = values_ND.to(dtype)
    tokens_ND, scales_NG = to_int8(values_ND)
    assert tokens_ND.dtype is torch.int8 and scales_NG.shape == (7, 4) and scales_NG.dtype is torch.float32
    back_ND = from_int8(tokens_ND, scales_NG, torch.float32)
    off_ND = (back_ND - values_ND.float()).abs().unflatten(-1, (-1, GROUP))
    assert (off_ND <= scales_NG.unsqueeze(-1) * 0.5001).all()
    assert torch.equal(back_ND[2, :GROUP], torch.zeros(GROUP))
    large, others = off_ND[:, 0], off_ND[:, 1:]
    assert large.max() > 4 * others.max()  # the channel costs its own group alone


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_found_in_what_comes_back(bad):
    values_ND = torch.ones(3, 2 * GROUP)
    values_ND[1, GROUP + 3] = bad
    finite = from_int8(*to_int8(values_ND), torch.bfloat16).isfinite()
    assert not finite[1, GROUP:].all() and finite[0].all() and finite[1, :GROUP].all()


def test_a_width_that_groups_do_not_divide_is_refused():
    check_width(4096)
    with pytest.raises(InvalidInput, match="^wire_dtype: is int8, which needs a width that 64 divides; it is 100$"):
        check_width(100)
