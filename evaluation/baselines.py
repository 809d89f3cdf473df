"""What can be scored without looking at the image: the majority answer, and the best guess from the question alone."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

from training.data.questions import QuestionAnswer
from training.data.vocabulary import COLOURS, SHAPES, WORDS

SEEN_OFTEN = 5
"""A question seen less often in training is answered as questions of its form are."""
SLOTS: dict[str, str] = {"colour": "|".join(COLOURS), "shape": "|".join(SHAPES), "word": "|".join(WORDS)}
CLOSED_WORDS = re.compile("|".join(rf"\b(?P<{name}>{words})\b" for name, words in SLOTS.items()) + r"|(?P<number>\d+)")


class Baselines:
    """Counts the answers to training questions."""

    def __init__(self, asked: Iterable[QuestionAnswer]):
        self.by_kind: dict[str, Counter[str]] = defaultdict(Counter)
        self.by_question: dict[str, Counter[str]] = defaultdict(Counter)
        self.by_form: dict[str, Counter[str]] = defaultdict(Counter)
        for question in asked:
            self.by_kind[question.kind][question.answer] += 1
            self.by_question[question.question][question.answer] += 1
            self.by_form[form_of(question.question)][question.answer] += 1
        self.overall = sum(self.by_kind.values(), Counter())
        if not self.overall:
            raise ValueError("asked: baselines need at least one training question")

    def majority(self, asked: QuestionAnswer) -> str:
        """The commonest answer to this kind of question; to any question, when the kind is new."""
        return _commonest(self.by_kind.get(asked.kind) or self.overall)

    def question_only(self, asked: QuestionAnswer) -> str:
        """The commonest answer to exactly this question, else to questions of its form, else to its kind."""
        exactly = self.by_question.get(asked.question, Counter())
        if exactly.total() >= SEEN_OFTEN:
            return _commonest(exactly)
        form = self.by_form.get(form_of(asked.question))
        return _commonest(form) if form else self.majority(asked)


def form_of(question: str) -> str:
    """The question with its colours, shapes, words and numbers taken out."""
    return CLOSED_WORDS.sub(lambda match: f"<{match.lastgroup}>", question)


def _commonest(answers: Counter[str]) -> str:
    """The answer given most often; of equally common ones the first in the alphabet."""
    return min(answers, key=lambda answer: (-answers[answer], answer))
