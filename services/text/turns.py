"""What a conversation must be, and where its system turns go."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from services.common.errors import InvalidInput
from services.common.types import ImagePart, PromptTurn, TextPart

ROLES = ("system", "user", "assistant")


def has_words(turn: PromptTurn) -> bool:
    return any(isinstance(part, TextPart) and part.text.strip() for part in turn.parts)


def last_user_turn(turns: Sequence[PromptTurn]) -> int:
    """Index of the turn that asks; -1 where the user says nothing."""
    return max((index for index, turn in enumerate(turns) if turn.role == "user"), default=-1)


def join_leading_system_turns(turns: Sequence[PromptTurn]) -> list[PromptTurn]:
    """The system turns that begin a conversation become one, a blank line between them."""
    leading = list(itertools.takewhile(lambda turn: turn.role == "system", turns))
    return [_joined(leading), *turns[len(leading) :]] if len(leading) > 1 else list(turns)


def join_all_system_turns(turns: Sequence[PromptTurn]) -> list[PromptTurn]:
    """Every system turn becomes a part of the first, for templates that know one alone."""
    system = [turn for turn in turns if turn.role == "system"]
    return [_joined(system), *(turn for turn in turns if turn.role != "system")]


def _joined(turns: Sequence[PromptTurn]) -> PromptTurn:
    texts = ("".join(part.text for part in turn.parts if isinstance(part, TextPart)) for turn in turns)
    return PromptTurn(role="system", parts=(TextPart(text="\n\n".join(texts)),))


def check_turns(turns: Sequence[PromptTurn], num_images: int, *, continue_final: bool) -> None:
    """Raises InvalidInput: no turn, an unknown role, an image that is not used exactly once in order and by the user,
    nothing that is asked, or no turn of the assistant's to continue."""
    if not turns:
        raise InvalidInput("is empty, expected at least one turn", field="turns")
    images: list[int] = []
    for index, turn in enumerate(turns):
        if turn.role not in ROLES:
            raise InvalidInput(f"is {turn.role!r}, expected one of {', '.join(ROLES)}", field=f"turns[{index}].role")
        found = [part.image for part in turn.parts if isinstance(part, ImagePart)]
        if found and turn.role != "user":
            raise InvalidInput(f"has an image in a {turn.role} turn, only user turns may", field=f"turns[{index}]")
        images += found
    asking = last_user_turn(turns)
    asked = turns[asking]
    if not (has_words(asked) or any(isinstance(part, ImagePart) for part in asked.parts)):
        raise InvalidInput("asks nothing: it has neither words nor an image", field=f"turns[{asking % len(turns)}]")
    if images != list(range(num_images)):
        raise InvalidInput(
            f"use images {images}, expected each of the request's {num_images} once and in order", field="turns"
        )
    last = turns[-1]
    if continue_final and (last.role != "assistant" or not any(isinstance(part, TextPart) for part in last.parts)):
        raise InvalidInput(
            f"expects the last turn to be a text of the assistant's, it is the {last.role}'s",
            field="continue_final_message",
        )
