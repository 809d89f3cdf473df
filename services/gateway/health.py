"""Whether both stages can be reached, for load balancers and clients that ask before they send."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

from services.common.errors import DeadlineExceeded, FocusError, Overloaded

FRESH_S = 2.0
"""Seconds for which a stage that answered is not asked again; one that failed is asked after a quarter of them."""
TIMEOUT_S = 5.0


class Stage(Protocol):
    """A stage's client."""

    name: str
    heard_at: float
    """The moment of the stage's last answer, as time.monotonic() has it."""

    async def check(self, model_fingerprint: str, timeout_s: float) -> None:
        """Asks the stage, which sets `heard_at`. Raises FocusError."""


class Health:
    """Asks each stage at most once at a time, however many ask here."""

    def __init__(self, stages: Sequence[Stage], model_fingerprint: str):
        self._stages = [_StageHealth(stage, model_fingerprint) for stage in stages]

    async def failures(self) -> list[str]:
        """What is wrong, a line for each stage that does not answer."""
        found = await asyncio.gather(*(stage.failure() for stage in self._stages))
        return [line for line in found if line]


class _StageHealth:
    """What is known of one stage, and how old it is."""

    def __init__(self, stage: Stage, model_fingerprint: str):
        self._stage, self._model_fingerprint, self._lock = stage, model_fingerprint, asyncio.Lock()
        self._failed_at, self._failure = -FRESH_S, ""

    async def failure(self) -> str:
        async with self._lock:
            now = time.monotonic()
            if now - self._stage.heard_at < FRESH_S:
                return ""
            if now - self._failed_at < FRESH_S / 4:
                return self._failure
            try:
                await self._stage.check(self._model_fingerprint, TIMEOUT_S)
            except Overloaded:  # it is there, and full
                return ""
            except DeadlineExceeded:
                self._failure = f"the {self._stage.name} stage has not answered in {TIMEOUT_S:g} s"
            except FocusError as error:
                said = str(error)
                self._failure = said if self._stage.name in said else f"the {self._stage.name} stage: {said}"
            else:
                return ""
            self._failed_at = time.monotonic()
            return self._failure
