"""A short way from where an answer is to where its constraint lets it end, for the last tokens that it may have.

A weak model can fill a string for ever, and max_tokens would cut its JSON in the middle. The way is found by trying:
the token that most likely closes something, then again. In JSON whose strings follow no pattern it is always found;
elsewhere it may not be, and then the answer is cut.
"""

from __future__ import annotations

import string

import llguidance
import numpy as np

MOST_STEPS = 128
_ORDER = (
    '"]}',
    "".join(set(string.punctuation) - set('"[]{}\\-+.')),
    string.digits,
    string.ascii_letters + "-+.",
    "[{",
)
"""Characters that a way prefers, best first; any other comes last."""
_CLASS_OF_BYTE = {ord(char): number for number, chars in enumerate(_ORDER) for char in chars}
_NEVER = 1 << 30


class Closing:
    """Finds ways to the end, in one tokenizer's tokens."""

    def __init__(self, tokenizer: llguidance.LLTokenizer, vocabulary: int):
        self._rank = np.array([_rank(tokenizer, token) for token in range(vocabulary)])

    def way(self, matcher: llguidance.LLMatcher) -> list[int] | None:
        """Tokens after which the answer may end; none where it may end now; None where no way is found."""
        ahead, way = matcher.deep_copy(), list[int]()
        while not ahead.is_accepting():
            if len(way) == MOST_STEPS or ahead.is_error():
                return None
            bits = np.frombuffer(ahead.compute_bitmask(), dtype=np.uint8)
            allowed = np.unpackbits(bits, bitorder="little")[: len(self._rank)].nonzero()[0]
            if not len(allowed):
                return None
            way.append(int(allowed[self._rank[allowed].argmin()]))
            ahead.consume_token(way[-1])
        return way


def _rank(tokenizer: llguidance.LLTokenizer, token: int) -> int:
    """How well a token closes, smaller is better: by the worst of its characters, then by its length."""
    if tokenizer.is_special_token(token):
        return _NEVER
    spelt = tokenizer.decode_bytes([token])
    worst = max((_CLASS_OF_BYTE.get(byte, len(_ORDER)) for byte in spelt), default=len(_ORDER))
    return 1000 * worst - min(len(spelt), 999)
