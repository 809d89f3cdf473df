"""Exact match by kind of question."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from training.data.poster_questions import COARSE_KINDS, FINE_KINDS
from training.data.questions import QuestionAnswer

GROUPS: dict[str, tuple[str, ...]] = {"fine": FINE_KINDS, "coarse": COARSE_KINDS}


@dataclass(frozen=True, kw_only=True)
class Tally:
    """How many of some questions were answered right."""

    right: int
    asked: int

    @property
    def percent(self) -> float:
        return 100 * self.right / self.asked


def is_exact(answer: str, expected: str) -> bool:
    """Equal but for surrounding space, case and one full stop at the end."""
    return answer.strip().removesuffix(".").casefold() == expected.casefold()


def exact_match(
    asked: Iterable[QuestionAnswer],
    answers: Iterable[str],
    groups: Mapping[str, Sequence[str]] = GROUPS,
) -> dict[str, Tally]:
    """Kind, group of kinds, and "all" -> tally; what was never asked is left out.

    Every question counts once in a group, so kinds asked often weigh more. Raises ValueError when there are more
    questions than answers, or fewer.
    """
    hits: dict[str, list[bool]] = {"all": []}
    for question, answer in zip(asked, answers, strict=True):
        names = [name for name, kinds in groups.items() if question.kind in kinds]
        for name in ("all", question.kind, *names):
            hits.setdefault(name, []).append(is_exact(answer, question.answer))
    return {name: Tally(right=sum(of_name), asked=len(of_name)) for name, of_name in sorted(hits.items()) if of_name}
