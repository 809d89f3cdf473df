"""Questions and answers to training branches, through the served model's own prompt code.

Each answer is a branch of its own with the turns before it as context, so that every question selects its own visual
tokens, as it does when served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.common.types import ChatTurn, ImagePart, TextPart
from services.llm.prompt import PromptRenderer
from training.layout import Branch


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A question, its answer, and where in the image the answer is (fractions, or None)."""

    question: str
    answer: str
    evidence_xyxy: tuple[float, float, float, float] | None = None


class BranchBuilder:
    """Builds branches of one image."""

    def __init__(self, renderer: PromptRenderer):
        self.renderer = renderer
        self.end = renderer.tokenizer.eos_token

    def build(self, exchanges: Sequence[Exchange], history: Sequence[Exchange] = ()) -> tuple[tuple[int, ...], Branch]:
        """Branch of the last exchange; `history` are the turns before it. Also returns the words before the image."""
        turns: list[ChatTurn] = []
        for index, exchange in enumerate((*history, *exchanges)):
            words = TextPart(text=exchange.question)
            parts = (ImagePart(image=0), words) if index == 0 else (words,)
            turns.append(ChatTurn(role="user", parts=parts))
            turns.append(ChatTurn(role="assistant", parts=(TextPart(text=exchange.answer),)))
        prompt = self.renderer.render(turns[:-1], [1])
        start, end = prompt.visual_spans[0]
        # The prompt ends before the answer's space, as it does when the model is asked to answer.
        answer = self.renderer.tokenizer(f" {exchange.answer}{self.end}", add_special_tokens=False)["input_ids"]
        after = prompt.input_ids[end:]
        asked = set(prompt.instruction_positions)
        branch = Branch(
            token_ids=(*after, *answer),
            labels=(*[-100] * len(after), *answer),
            instruction=(*[end + i in asked for i in range(len(after))], *[False] * len(answer)),
            answer_start=len(after),
            evidence_xyxy=exchange.evidence_xyxy,
        )
        return prompt.input_ids[:start], branch
