"""Questions and answers about one image to training branches, through the served model's own prompt code.

Each answer is a branch of its own, so that every question selects its own visual tokens, as it does when served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from services.common.errors import InvalidInput
from services.common.types import ImagePart, ImageTiles, PromptTurn, TextPart
from services.modeling.loss import IGNORED
from services.modeling.packing import TrainedSequence
from services.text.prompt import PromptRenderer
from training.data.fonts import Box

Boxes = Sequence[Box]
"""Left, top, right and bottom of each, as fractions of the image's width and height."""


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One question about an image: what follows the image in the prompt, with its answer."""

    token_ids: tuple[int, ...]
    labels: tuple[int, ...]
    """The token itself where it belongs to the answer, else -100."""
    instruction: tuple[bool, ...]
    """Whether each token is one of the user's own words."""
    answer_start: int
    """Index of the first answer token."""
    evidence_xyxy: tuple[Box, ...] = ()
    """Where in the image the answer is, as fractions of width and height; used by the grounding loss only."""
    asks_place: bool = False
    """Whether the answer is the evidence's place in the image."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image and its branches."""

    image: ImageTiles
    prefix_ids: tuple[int, ...]
    """The words before the image."""
    branches: tuple[Branch, ...]
    glyph_boxes: tuple[Box, ...] = ()
    """Everything in the image that only full resolution shows, as fractions; an oracle's, where the source knows."""

    def sequence(self, image_token_id: int) -> TrainedSequence:
        """The sample as the model takes it, its words on the CPU."""
        prefix = (*self.prefix_ids, image_token_id)
        with torch.device("cpu"):
            return TrainedSequence(
                input_ids=torch.tensor([*prefix, *(n for each in self.branches for n in each.token_ids)]),
                labels=torch.tensor([IGNORED] * len(prefix) + [n for each in self.branches for n in each.labels]),
                instruction=torch.tensor([False] * len(prefix) + [n for e in self.branches for n in e.instruction]),
                images=(self.image,),
                branches=tuple(len(each.token_ids) for each in self.branches),
            )


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

    def build(self, exchange: Exchange) -> tuple[tuple[int, ...], Branch]:
        """The branch of an exchange, and the words before the image."""
        turn = PromptTurn(role="user", parts=(ImagePart(image=0), TextPart(text=exchange.question)))
        prompt = self.renderer.render([turn], [1])
        start, end = prompt.visual_spans[0]
        # Tokenised apart from the prompt, as generated tokens are.
        answer_text = f"{self.before_answer}{exchange.answer}{self.after_answer}"
        answer = self.renderer.tokenizer(answer_text, add_special_tokens=False)["input_ids"]
        after = prompt.input_ids[end:]
        asked = set(prompt.instruction_positions)
        branch = Branch(
            token_ids=(*after, *answer),
            labels=(*[IGNORED] * len(after), *answer),
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
