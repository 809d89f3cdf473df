"""A scripted gateway on a real socket, and a client that asks it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from focusllava import FocusClient
from tests.fakes.gateway import QUICK, ScriptedGateway


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    gateway = ScriptedGateway()
    yield gateway
    gateway.stop()


@pytest.fixture
def client(gateway: ScriptedGateway) -> Iterator[FocusClient]:
    with FocusClient(gateway.address, timeout_s=20, retry=QUICK) as client:
        yield client
