"""What can be wrong with an entry of training data: the kinds, and the error that names one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from services.common.errors import InvalidInput

FaultKind = Literal[
    "malformed", "turn_order", "image_marks", "empty_answer", "missing_image", "corrupt_image", "image_size", "too_long"
]
KINDS: tuple[FaultKind, ...] = get_args(FaultKind)


class EntryFault(InvalidInput):
    """An entry that cannot be trained on. Its message says why and does not name the entry."""

    def __init__(self, kind: FaultKind, message: str):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, kw_only=True)
class Fault:
    """An entry that was left out."""

    kind: FaultKind
    name: str
    """File and entry."""
    message: str

    @classmethod
    def of(cls, error: EntryFault, name: str) -> Fault:
        return cls(kind=error.kind, name=name, message=str(error))

    def __str__(self) -> str:
        return f"{self.name}: {self.kind}: {self.message}"
