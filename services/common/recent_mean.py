"""A running mean that follows what changes."""

from __future__ import annotations


class RecentMean:
    """A mean in which the latest 16 or so values count."""

    def __init__(self) -> None:
        self.value = 0.0
        self._count = 0

    def add(self, value: float) -> None:
        self._count = min(self._count + 1, 16)
        self.value += (value - self.value) / self._count
