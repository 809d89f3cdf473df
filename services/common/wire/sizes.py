"""Refuses by its size alone what can never be answered, before a byte is copied or a word is tokenised."""

from __future__ import annotations

from dataclasses import dataclass

from focusllava.v1 import llm_pb2
from services.common.errors import InvalidInput

MAX_REST_BYTES = 2**20
"""Most bytes of a request's fields beside its images' visual tokens and its texts."""
MAX_TEXT_BYTES_A_TOKEN = 16
"""Most bytes of a token, on average over a prompt that fills the context; words have 3 to 5. Counting the tokens of a
megabyte takes seconds and hundreds of megabytes."""
_OVERHEAD_BYTES = 8  # the least of a turn, a part or an image: a million empty ones are not free
_MAX_BYTES_A_VALUE = 4  # a visual token's on the wire: float32


@dataclass(frozen=True, kw_only=True)
class RequestSizes:
    """The most that a request to one model may hold."""

    context: int
    """Tokens of the model's context."""
    width: int
    """Values of a visual token."""

    def check(self, message: llm_pb2.GenerateRequest) -> None:
        """Raises InvalidInput naming the field. What passes may still be too long: tokens are counted later."""
        most = self.context * self.width * _MAX_BYTES_A_VALUE
        visual = sum(len(image.tokens.data) for image in message.images)
        if visual > most:
            raise InvalidInput(
                f"hold {visual} bytes of visual tokens, the model's context of {self.context} has room for {most}",
                field="images",
            )
        most = self.context * MAX_TEXT_BYTES_A_TOKEN
        turns = sum(len(part.text.encode()) for turn in message.turns for part in turn.parts)
        for field, text in (("turns", turns), ("raw_prompt", message.raw_prompt.ByteSize())):
            if text > most:
                raise InvalidInput(
                    f"has {text} bytes of text, a context of {self.context} tokens has room for {most} at most",
                    field=field,
                )
        # A message's ByteSize writes it out, which megabytes of visual tokens are too many for.
        rest = len(message.request_id) + message.sampling.ByteSize() + message.prune.ByteSize()
        rest += sum(_OVERHEAD_BYTES * (1 + len(turn.parts)) for turn in message.turns)
        rest += sum(
            _OVERHEAD_BYTES + len(image.branch_ids) + len(image.base_branch_ids) + sum(map(len, image.notes))
            for image in message.images
        )
        if rest > MAX_REST_BYTES:
            raise InvalidInput(
                f"has {rest} bytes beside visual tokens and texts, expected at most {MAX_REST_BYTES}", field="request"
            )
