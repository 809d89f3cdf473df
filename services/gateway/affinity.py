"""The replica of the language model that a conversation belongs to, where its follow-ups find their beginning."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol, TypeVar

from focusllava.v1 import llm_pb2


class Named(Protocol):
    @property
    def name(self) -> str: ...


Item = TypeVar("Item", bound=Named)


def ranked(items: Sequence[Item], beginning: str) -> list[Item]:
    """The items in the order in which they have this beginning: rendezvous hashing.

    Everybody who knows the same items has the same order, with no state. An item that comes or goes changes nothing
    between the others: only its own share of the beginnings moves.
    """

    def weight(item: Item) -> bytes:
        return hashlib.blake2b(f"{beginning}\n{item.name}".encode(), digest_size=16).digest()

    return sorted(items, key=weight)


def beginning_of(request: llm_pb2.GenerateRequest, image_keys: Sequence[str]) -> str:
    """What a prompt's later turns have in common with its first: its first image, or else the words up to the first
    question's end. Empty for a raw prompt, whose parts nobody knows.

    image_keys: what the images' visual tokens are known by, in their order.
    """
    if image_keys:
        return image_keys[0]
    words = hashlib.blake2b(digest_size=16)
    for turn in request.turns:
        words.update(turn.SerializeToString(deterministic=True))
        if turn.role == llm_pb2.ROLE_USER:
            return words.hexdigest()
    return ""
