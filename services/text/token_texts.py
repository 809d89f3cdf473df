"""What single tokens read, for the alternatives beside an answer's tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

from services.common.types import TokenEvent, TokenLogprob, TokenLogprobs
from services.text.detokenizer import REPLACEMENT

E = TypeVar("E")


class TokenTexts:
    """One tokenizer's tokens as text; special tokens by name, a part of a character as U+FFFD."""

    def __init__(self, tokenizer: Any, token_bytes: Callable[[int], bytes]):
        """token_bytes: gives a token's own bytes; called for parts of characters alone."""
        self._tokenizer, self._token_bytes = tokenizer, token_bytes
        # Decoders drop the space that begins a first token: each token is read after this one.
        self._anchor: int = tokenizer.encode("a", add_special_tokens=False)[-1]
        self._before = len(self._decode([self._anchor]))
        self.text = functools.lru_cache(maxsize=1 << 16)(self._text)

    def filled_in(self, event: E) -> E:
        """The event with the text of every token in its log probabilities; any other event as it is."""
        if not isinstance(event, TokenEvent) or not event.logprobs:
            return event
        logprobs = tuple(
            TokenLogprobs(chosen=self._named(entry.chosen), top=tuple(map(self._named, entry.top)))
            for entry in event.logprobs
        )
        return dataclasses.replace(event, logprobs=logprobs)

    def _named(self, token: TokenLogprob) -> TokenLogprob:
        text = self.text(token.token_id)
        raw = self._token_bytes(token.token_id) if REPLACEMENT in text else text.encode()
        return dataclasses.replace(token, text=text, raw_bytes=raw)

    def _text(self, token_id: int) -> str:
        return self._decode([self._anchor, token_id])[self._before :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
