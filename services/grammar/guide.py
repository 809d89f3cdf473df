"""One answer's way through its constraint: what it has said so far, and when it must end.

Legend: W words of a mask, a bit a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import llguidance
import numpy as np
import numpy.typing as npt

from services.common.types import SamplingParams
from services.grammar.closing import MOST_STEPS, Closing

SPARE_TOKENS = 8
"""An answer that nears max_tokens goes to its constraint's end when so many are left beside it, or an eighth of all."""


class Start(NamedTuple):
    """A constraint at its beginning."""

    matcher: llguidance.LLMatcher
    """A matcher that has read nothing; it is copied, never changed."""
    way: list[int] | None
    """The shortest way to the end that is known (`Closing.way`)."""


class Guide:
    """One answer's way through its constraint."""

    def __init__(
        self,
        start: Start,
        sampling: SamplingParams,
        max_new_tokens: int,
        eos_token_ids: Sequence[int],
        closing: Closing,
    ):
        self.error = ""
        """Why no next token is known; its request must end."""
        self.closes = False
        """The answer has no more tokens left than its end takes: it goes there by the shortest way."""
        assert sampling.constraint is not None
        self.constraint = sampling.constraint
        self.matcher = start.matcher.deep_copy()
        self.ahead: list[int] = []
        """Tokens of the answer that the matcher has not seen yet."""
        self.forced: list[int] = []
        """Tokens that must come, the next one last; empty where that is not known."""
        self._closing, self._eos = closing, eos_token_ids
        self._most, self._min_tokens = max_new_tokens, sampling.min_tokens
        self._end = eos_token_ids if sampling.ignore_eos else ()
        self._early_end = (*eos_token_ids, *sampling.stop_token_ids)
        self._taken = 0
        self._longest_way, self._look_at = SPARE_TOKENS, 0
        self._look(start.way)

    def take(self, token: int) -> None:
        """The answer went on by a token."""
        self.ahead.append(token)
        self._taken += 1
        if self.forced and self.forced.pop() != token:  # its score was no number, say: let the matcher see it
            self.forced.clear()

    def next_forced(self) -> int | None:
        """The token that must come next; None where the matcher's mask decides.

        A forced text, such as a field's name, is looked for once: that costs as much as a mask, for all its tokens.
        """
        if self.forced and (self.closes or self._taken < self._look_at):
            return self.forced[-1]
        if self.ahead:
            self.matcher.consume_tokens(self.ahead)
            self.ahead.clear()
        if not self.closes:
            if self._taken >= self._look_at:
                self._look(self._closing.way(self.matcher))
            if not self.closes:
                self.forced = self.matcher.compute_ff_tokens()[::-1]
        return self.forced[-1] if self.forced else None

    def restrict(self, mask_W: npt.NDArray[np.uint32]) -> None:
        """Takes the end out of its matcher's mask while it is too early, unless nothing else is left."""
        waiting = self._early_end if self._taken < self._min_tokens else self._end
        found = [token for token in waiting if mask_W.item(token // 32) >> token % 32 & 1]
        if found:
            left_W = mask_W.copy()
            for token in found:
                left_W[token // 32] &= ~np.uint32(1 << token % 32)
            if left_W.any():
                mask_W[:] = left_W

    def _look(self, way: list[int] | None) -> None:
        """Closes if it is time for this way to the end; else says when to look for one again.

        That is the more often the fewer tokens are left beside it."""
        left = self._most - self._taken
        if way is None or len(way) > left:
            self._look_at = self._taken + MOST_STEPS
            return
        self._longest_way = max(self._longest_way, len(way))
        # The next token may open something that takes as many more to close.
        spare = left - len(way) - min(self._longest_way, self._most // 8)
        self._look_at = self._taken + max(1, spare // 2)
        if spare <= 0:
            self.closes, self.forced = True, [self._eos[0], *reversed(way)]
