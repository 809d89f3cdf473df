"""Questions and answers to training branches, through the served model's own prompt code.

Each answer is a branch of its own with the turns before it as context, so that every question selects its own visual
tokens, as it does when served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.common.errors import InvalidInput
from services.common.types import ImagePart, PromptTurn, TextPart
from services.text.prompt import PromptRenderer
from training.data.fonts import Box
from training.layout import Branch


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A question, its answer, and where in the image the answer is (fractions; empty when that is not known)."""

    question: str
    answer: str
    evidence_xyxy: tuple[Box, ...] = ()
    asks_place: bool = False
    """Whether the answer is the evidence's place in the image."""


class BranchBuilder:
    """Builds branches of one image."""

    def __init__(self, renderer: PromptRenderer):
        self.renderer = renderer
        self.before_answer, self.after_answer = _around_answer(renderer.tokenizer)

    def build(self, exchange: Exchange, history: Sequence[Exchange] = ()) -> tuple[tuple[int, ...], Branch]:
        """The branch of an exchange with the turns before it, and the words before the image."""
        turns: list[PromptTurn] = []
        for index, turn in enumerate((*history, exchange)):
            words = TextPart(text=turn.question)
            parts = (ImagePart(image=0), words) if index == 0 else (words,)
            turns.append(PromptTurn(role="user", parts=parts))
            turns.append(PromptTurn(role="assistant", parts=(TextPart(text=turn.answer),)))
        prompt = self.renderer.render(turns[:-1], [1])
        start, end = prompt.visual_spans[0]
        # Tokenised apart from the prompt, as generated tokens are.
        answer_text = f"{self.before_answer}{exchange.answer}{self.after_answer}"
        answer = self.renderer.tokenizer(answer_text, add_special_tokens=False)["input_ids"]
        after = prompt.input_ids[end:]
        asked = set(prompt.instruction_positions)
        branch = Branch(
            token_ids=(*after, *answer),
            labels=(*[-100] * len(after), *answer),
            instruction=(*[end + i in asked for i in range(len(after))], *[False] * len(answer)),
            answer_start=len(after),
            evidence_xyxy=exchange.evidence_xyxy,
            asks_place=exchange.asks_place,
        )
        return prompt.input_ids[:start], branch


def _around_answer(tokenizer: Any) -> tuple[str, str]:
    """What the chat template puts between the generation prompt and an answer, and after it up to the end token."""
    asked = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    mark = "\uf8ff"
    answered = [*asked, {"role": "assistant", "content": [{"type": "text", "text": mark}]}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(answered, tokenize=False)
    before, _, after = whole.removeprefix(prompt).partition(mark)
    if not whole.startswith(prompt) or tokenizer.eos_token not in after:
        raise InvalidInput("an answer does not follow its prompt and end with the end token", field="chat_template")
    return before, after[: after.index(tokenizer.eos_token) + len(tokenizer.eos_token)]
