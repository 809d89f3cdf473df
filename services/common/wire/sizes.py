"""What can never be answered is refused by its size alone, before a byte is copied or a word is tokenised."""

from __future__ import annotations

from dataclasses import dataclass

from focusllava.v1 import llm_pb2
from services.common.errors import InvalidInput

MAX_REST_BYTES = 2**20
"""Of a request's fields beside its images' visual tokens and its turns."""
_MAX_BYTES_A_VALUE = 4  # of a visual token on the wire: float32


@dataclass(frozen=True, kw_only=True)
class RequestSizes:
    """The most that a request to one model may hold."""

    context: int
    """Tokens of the model's context."""
    width: int
    """Values of a visual token."""
    longest_token: int
    """Bytes of the longest text that one token stands for."""

    def check(self, message: llm_pb2.GenerateRequest) -> None:
        """Raises InvalidInput naming the field. What passes may still be too long: tokens are counted later."""
        most = self.context * self.width * _MAX_BYTES_A_VALUE
        visual = sum(len(image.tokens.data) for image in message.images)
        if visual > most:
            raise InvalidInput(
                f"hold {visual} bytes of visual tokens, the model's context of {self.context} has room for {most}",
                field="images",
            )
        most = self.context * self.longest_token + MAX_REST_BYTES  # the names of roles and parts take a little
        turns = sum(turn.ByteSize() for turn in message.turns)
        if turns > most:
            raise InvalidInput(
                f"hold {turns} bytes, more than a prompt can that fits the model's context of {self.context} tokens",
                field="turns",
            )
        rest = message.ByteSize() - visual - turns
        if rest > MAX_REST_BYTES + 8 * (len(message.turns) + len(message.images)):
            raise InvalidInput(
                f"has {rest} bytes beside visual tokens and turns, expected at most {MAX_REST_BYTES}", field="request"
            )
