"""An answer that goes on after its stage was lost: a new try repeats it, and only what is new is passed on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from focusllava.v1 import llm_pb2
from services.common.errors import FocusError

T = TypeVar("T")


class Replay:
    """What the caller has of an answer, and how far the try under way has come in repeating it."""

    def __init__(self) -> None:
        self._chars, self._token_ids = _Part[str](), _Part[int]()
        self._logprobs = _Part[llm_pb2.TokenLogprobs]()
        self.decided = False
        """Whether the caller has the text-guided sampler's decision, which a new try makes and sends again."""

    @property
    def begun(self) -> bool:
        """Whether the caller has anything of it."""
        return bool(self._chars.sent or self._token_ids.sent)

    def start_over(self) -> None:
        """Begins a new try, from the first token."""
        for part in (self._chars, self._token_ids, self._logprobs):
            part.at = 0

    def take(self, token: llm_pb2.Token) -> llm_pb2.Token | None:
        """The part of the try's next token that the caller lacks, if any. Raises FocusError where the token differs."""
        chars, token_ids = self._chars.take(token.text), self._token_ids.take(token.token_ids)
        # Logits of a replay may be rounded otherwise: the same token is enough.
        logprobs = self._logprobs.take(token.logprobs, same=False)
        if not (chars or token_ids):
            return None
        return llm_pb2.Token(
            text="".join(chars), token_ids=token_ids, logprobs=logprobs, prompt_tokens=token.prompt_tokens
        )

    def check_end(self) -> None:
        """Raises FocusError when the try ends before it has repeated what the caller has."""
        if self._chars.behind or self._token_ids.behind:
            raise _different_answer()


class _Part(Generic[T]):
    """A list that the caller has, and how much of it the try under way has repeated."""

    def __init__(self) -> None:
        self.sent: list[T] = []
        self.at = 0

    @property
    def behind(self) -> bool:
        return self.at < len(self.sent)

    def take(self, new: Sequence[T], *, same: bool = True) -> list[T]:
        """The part of `new` that the caller does not have; it counts as sent from now on."""
        repeated = self.sent[self.at : self.at + len(new)]
        if same and repeated != list(new[: len(repeated)]):
            raise _different_answer()
        fresh = list(new[len(repeated) :])
        self.sent += fresh
        self.at += len(new)
        return fresh


def _different_answer() -> FocusError:
    return FocusError("the llm stage was lost and its answer could not be continued; ask again")
