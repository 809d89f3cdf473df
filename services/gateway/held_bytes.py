"""Bounds the bytes that are held at once: bodies that are read and decoded, and images of requests under way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from services.common.errors import Overloaded
from services.common.telemetry import Metrics
from services.gateway.callers import Caller


class HeldBytes:
    """The sum of what is held, and each caller's part of it."""

    def __init__(self, limit: int, metrics: Metrics):
        self.limit, self._metrics = limit, metrics
        """Most bytes together; may be changed at any time."""
        self._total = 0
        self._of_each: dict[str, int] = {}

    @contextlib.contextmanager
    def holding(self, caller: Caller, amount: int = 0) -> Iterator[Holding]:
        """Counts bytes from here to the end of the block. Raises Overloaded where they are too many."""
        holding = Holding(self, caller)
        try:
            holding.add(amount)
            yield holding
        finally:
            self._count(caller.name, -holding.amount)

    def _take(self, caller: Caller, amount: int) -> None:
        """Raises Overloaded where no room is left, or where the holder of a key would have more than is left free."""
        free = self.limit - self._total
        # So whoever comes next finds room: one key gets half of all, two a third each (Choudhury and Hahne, 1998).
        others_need = self._of_each.get(caller.name, 0) if caller.key else 0
        if (self._total and amount > free) or (others_need and others_need + amount > free):
            raise Overloaded(f"the server holds {self._total} bytes of requests, its limit is {self.limit}")
        self._count(caller.name, amount)

    def _count(self, caller: str, change: int) -> None:
        self._total += change
        self._of_each[caller] = self._of_each.get(caller, 0) + change
        if not self._of_each[caller]:
            del self._of_each[caller]
        self._metrics.set("focusllava_held_bytes", self._total)


class Holding:
    """What one request holds."""

    def __init__(self, held: HeldBytes, caller: Caller):
        self._held, self._caller, self.amount = held, caller, 0

    def add(self, amount: int) -> None:
        """Holds so much more. Raises Overloaded where it is too much."""
        self._held._take(self._caller, amount)
        self.amount += amount
