"""Settings out of range that only code in the same process can bring: the wire's types exclude them."""

from __future__ import annotations

import pytest

from services.common.errors import InvalidInput
from services.common.ranges import check_samplers, check_sampling
from services.common.types import SamplerSettings, SamplingParams


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": -1}, "asked.max_tokens: is -1, expected 1 or more"),
        ({"top_k": -1}, "asked.top_k: is -1, expected 0 or more"),
        ({"seed": -1}, "asked.seed: is -1, expected [0, 18446744073709551615]"),
        ({"seed": 2**64}, "asked.seed: is 18446744073709551616, expected [0, 18446744073709551615]"),
        ({"logprobs": -1}, "asked.logprobs: is -1, expected [0, 20]"),
        ({"temperature": 1e400}, "asked.temperature: is inf, expected [0, 2]"),
        ({"stop": ("a", "")}, "asked.stop[1]: is empty"),
        ({"stop": ("a",) * 9}, "asked.stop: has 9 strings, expected at most 8"),
        ({"stop": ("a" * 257,)}, "asked.stop[0]: has 257 characters, expected at most 256"),
    ],
)
def test_values_that_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_sampling(SamplingParams(**changes), "asked")
    assert str(caught.value) == message


def test_the_defaults_are_in_range() -> None:
    check_sampling(SamplingParams())
    check_samplers(SamplerSettings())
