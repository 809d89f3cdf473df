"""The holder of an API key, as one replica of the gateway knows it: what it has in flight, what its minute has left."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from services.common.errors import Overloaded
from services.common.settings import Count, require

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """One entry of the keys: who holds it, and how much of the service that is good for. An unset limit is none.

    Each replica of the gateway counts for itself: with two of them a caller may get twice as much.
    """

    name: str
    """The holder's name, in logs and metrics."""
    sha256: str
    """SHA-256 of the key, in hexadecimal. A fast hash is right here: a key is 256 random bits, which nobody finds by
    trying. For a password, which people choose, it would be wrong."""
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    """Tokens of prompts and answers, counted as they come: what is in flight may go over it."""
    concurrency: Count | None = None
    """Most requests in flight, those that wait included."""
    max_tokens: Count | None = None
    """Most tokens of one answer, where the door's own limit is not lower."""

    def __post_init__(self) -> None:
        require(bool(_NAME.fullmatch(self.name)), "name", self.name, "up to 64 letters, digits, '.', '_' or '-'")
        # What stands here by mistake may be a key: it is not shown.
        require(bool(_SHA256.fullmatch(self.sha256)), "sha256", "...", "64 hexadecimal digits, in small letters")


class Caller:
    """One who asks: the holder of a key, or anybody where there are no keys."""

    def __init__(self, key: ApiKey | None = None, clock: Callable[[], float] = time.monotonic):
        self.key = key
        """The entry, which may change while it is served; None is anybody."""
        self.in_flight = 0
        self._requests, self._tokens = _Spent(clock), _Spent(clock)

    @property
    def name(self) -> str:
        """The holder's name; empty for anybody."""
        return self.key.name if self.key else ""

    def most_tokens(self, limit: int) -> int:
        """The longest answer that this caller may ask for, where everybody may ask for `limit` tokens."""
        return min(limit, self.key.max_tokens or limit) if self.key else limit

    def check(self) -> None:
        """Raises Overloaded where the next request would be one too many."""
        key = self.key
        if key is None:
            return
        if key.concurrency is not None and self.in_flight >= key.concurrency:
            raise Overloaded(f"the key {key.name!r} has {self.in_flight} requests in flight, its limit")
        for what, spent, limit in (
            ("requests", self._requests, key.requests_per_minute),
            ("tokens", self._tokens, key.tokens_per_minute),
        ):
            wait_s = spent.wait_s(limit)
            if wait_s:
                said = f"the key {key.name!r} has used its {limit} {what} a minute; try again in {wait_s:.1f} s"
                raise Overloaded(said, retry_after_s=wait_s)

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Counts a request from here to the end of the block. Raises Overloaded as `check`."""
        self.check()
        self._requests.add(1)
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def charge(self, tokens: int) -> None:
        """Counts tokens of a prompt or an answer."""
        self._tokens.add(tokens)


class _Spent:
    """An amount that was spent, of so much a minute; time gives it back steadily."""

    def __init__(self, clock: Callable[[], float]):
        self._clock, self._amount, self._at = clock, 0.0, clock()

    def add(self, amount: float) -> None:
        self._amount += amount

    def wait_s(self, limit: int | None) -> float:
        """Seconds until one more is within `limit` a minute; 0 where it is now. None is no limit."""
        now = self._clock()
        given_back = float("inf") if limit is None else (now - self._at) * limit / 60
        self._amount, self._at = max(0.0, self._amount - given_back), now
        return 0.0 if limit is None else max(0.0, (self._amount + 1 - limit) * 60 / limit)
