"""What can be scored without looking at the image: the majority answer, and the best guess from the question alone."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

from training.data.questions import QuestionAnswer, questions
from training.data.splits import scene_at


class Baselines:
    """Counts answers over training scenes."""

    def __init__(self, scenes: int = 4000, seed: int = 0):
        self.by_kind: dict[str, Counter[str]] = defaultdict(Counter)
        self.by_question: dict[str, Counter[str]] = defaultdict(Counter)
        for index in range(scenes):
            for asked in questions(scene_at("train", seed, index), random.Random(f"{seed}/{index}")):
                self.by_kind[asked.kind][asked.answer] += 1
                self.by_question[asked.question][asked.answer] += 1

    def majority(self, asked: QuestionAnswer) -> str:
        """The commonest answer to this kind of question."""
        return self.by_kind[asked.kind].most_common(1)[0][0]

    def question_only(self, asked: QuestionAnswer) -> str:
        """The commonest answer to exactly this question."""
        seen = self.by_question.get(asked.question)
        return seen.most_common(1)[0][0] if seen else self.majority(asked)
