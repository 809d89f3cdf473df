"""The secret of the stages: which are taken, which are refused, and that none is no open door."""

from __future__ import annotations

import pytest

from services.common.errors import InvalidInput, WrongSecret
from services.common.stage_secret import SECRET_METADATA, SECRET_VARIABLE, check_secret, shared_secret

OWN, SHARED = "a" * 64, "b" * 64


class Call:
    def __init__(self, *metadata):
        self._metadata = metadata

    def invocation_metadata(self):
        return self._metadata or None


@pytest.mark.parametrize("secret", [OWN, SHARED])
def test_either_secret_opens_the_stage(secret):
    check_secret(Call(("application", "llm"), (SECRET_METADATA, secret)), (OWN, SHARED))


@pytest.mark.parametrize("accepted", [(OWN, SHARED), (OWN, ""), ("",), ()])
@pytest.mark.parametrize(
    "metadata", [(), ((SECRET_METADATA, ""),), ((SECRET_METADATA, "c" * 64),), ((SECRET_METADATA, b"\xff"),)]
)
def test_anything_else_is_refused(metadata, accepted):
    with pytest.raises(WrongSecret, match=SECRET_METADATA):
        check_secret(Call(*metadata), accepted)


def test_a_shared_secret_is_none_or_long():
    assert shared_secret({}) == shared_secret({SECRET_VARIABLE: ""}) == ""
    assert shared_secret({SECRET_VARIABLE: SHARED}) == SHARED
    for weak in ("short", "x" * 31, "ü" * 40, "a" * 40 + "\n"):
        with pytest.raises(InvalidInput, match=SECRET_VARIABLE) as caught:
            shared_secret({SECRET_VARIABLE: weak})
        assert weak not in str(caught.value)
