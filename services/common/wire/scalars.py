"""Singular scalar fields of a message that bear the names of a dataclass's."""

from __future__ import annotations

from typing import Any

import numpy as np
from google.protobuf.message import Message


def scalars(message: Message) -> dict[str, Any]:
    """The singular scalar fields that are set, by name."""
    given = {
        field.name: value
        for field, value in message.ListFields()
        if not field.is_repeated and field.message_type is None
    }
    return {name: shortest(v) if isinstance(v, float) else v for name, v in given.items()}


def shortest(value: float) -> float:
    """The shortest decimal that is this float32: 0.85, not 0.8500000238."""
    return float(str(np.float32(value)))
