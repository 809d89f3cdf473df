"""The moment by which a caller wants its answer."""

from __future__ import annotations

import math
import time

from services.common.errors import DeadlineExceeded

TIMEOUT_METADATA = "focusllava-timeout-ms"
"""Ray Serve hides a call's own deadline from the replica; a client may say it here. Its cancellation arrives anyway."""


class Deadline:
    """The moment by which a request must be done; None means that only the stages' own limits apply."""

    def __init__(self, seconds: float | None = None):
        self._end = None if seconds is None else time.monotonic() + seconds

    @classmethod
    def said(cls, milliseconds: str | None) -> Deadline:
        """The deadline in a caller's TIMEOUT_METADATA; what is not a number counts as none."""
        try:
            seconds = float(milliseconds) / 1000 if milliseconds is not None else math.inf
        except (TypeError, ValueError):
            seconds = math.inf
        return cls(seconds if math.isfinite(seconds) else None)

    def remaining_s(self, at_most: float) -> float:
        """Seconds that remain, no more than `at_most`. Raises DeadlineExceeded when none do."""
        left = at_most if self._end is None else min(at_most, self._end - time.monotonic())
        if left <= 0:
            raise DeadlineExceeded("the request took longer than its deadline")
        return left
