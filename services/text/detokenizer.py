"""Token ids to text as they come: whole UTF-8 characters only, and nothing that a stop string may yet take back."""

from __future__ import annotations

from typing import Any

from services.common.types import SamplingParams

REPLACEMENT = "\ufffd"
# A character is at most 4 bytes and every byte takes at most one token: past this many, the bytes are no character.
MAX_HELD_TOKENS = 8
WINDOW_TOKENS = 16


class Detokenizer:
    """The text of one answer."""

    def __init__(self, tokenizer: Any, sampling: SamplingParams):
        self.tokenizer = tokenizer
        self.stop = sampling.stop
        self._sampling = sampling
        self.stopped = False
        """A stop string was met; the text ends before it."""
        self._ids: list[int] = []
        self._window = 0  # decoding starts here, some tokens back, because a token's text depends on its left
        self._read = 0  # ids before this end on a whole character
        self._emitted = 0  # characters of the window's text that are emitted
        self._held = ""  # text that may be the beginning of a stop string

    def push(self, token_id: int) -> str:
        """New text that this token makes certain; may be empty."""
        self._ids.append(token_id)
        text = self._decode()
        if not text.endswith(REPLACEMENT):
            new = text[self._emitted :]
            self._emitted = len(text)
            if len(self._ids) - self._window > WINDOW_TOKENS:
                self._window = self._read
                self._emitted = len(self._decode())
            self._read = len(self._ids)
        elif len(self._ids) - self._read >= MAX_HELD_TOKENS:
            # Bytes that are no UTF-8 at all: all but the last can no longer become a character.
            new = text[self._emitted : -1]
            self._emitted = max(self._emitted, len(text) - 1)
        else:
            return ""
        return self._cut(new)

    def finish(self) -> str:
        """The rest of the text, when no more tokens come; a character that was never completed is left out."""
        rest = self._cut(self._decode()[self._emitted :].rstrip(REPLACEMENT)) + self._held
        self._held = ""
        return rest

    def _decode(self) -> str:
        return self.tokenizer.decode(
            self._ids[self._window :],
            skip_special_tokens=not self._sampling.keep_special_tokens,
            clean_up_tokenization_spaces=False,
        )

    def _cut(self, new: str) -> str:
        if len(self._ids) <= self._sampling.min_tokens:  # too early for an end
            return new
        pending = self._held + new
        found = [(pending.find(stop), stop) for stop in self.stop if stop in pending]
        if found:
            start, stop = min(found)
            self.stopped, self._held = True, ""
            return pending[: start + len(stop) * self._sampling.include_stop_str_in_output]
        keep = max((_overlap(pending, stop) for stop in self.stop), default=0)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0
