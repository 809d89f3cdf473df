"""A conversation to a training sequence, spelt by the code that spells the served prompts.

Legend: S tokens of the sequence, an image counted as one.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from services.checkpoint.config import FocusLlavaConfig
from services.common.errors import InvalidInput, TooLarge
from services.common.grid import unpadded_hw
from services.common.types import ImageTiles, PromptTurn, TextPart
from services.encoder.anyres import any_map_left
from services.encoder.reading import read_tiles
from services.modeling.loss import IGNORED
from services.modeling.packing import TrainedSequence
from services.text.prompt import PromptRenderer, spans_by_token
from training.data.entries import Conversation
from training.data.faults import EntryFault

Template = Literal["chat", "plain"]
"""The checkpoint's chat template, or images and answers alone, a line break after each: LLaVA's for captions."""
_PROBES = ("The", "1", "(", "\u00e9")
"""Beginnings of answers, with which tokenizers are tried."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A sequence, and what the limit on its length did to it."""

    sequence: TrainedSequence
    tokens: int
    """Tokens of the sequence with every image's visual tokens, none of them sampled away."""
    cut: int
    """Tokens that were cut off the end."""


class ConversationEncoder:
    """Encodes conversations for one checkpoint."""

    def __init__(
        self,
        config: FocusLlavaConfig,
        renderer: PromptRenderer,
        *,
        max_length: int | None = None,
        template: Template = "chat",
    ):
        """max_length: most tokens of a sequence, visual ones among them; the context of the model if that is less."""
        self.config, self.renderer, self.template = config, renderer, template
        self.max_length = min(max_length or renderer.context, renderer.context)
        tokenizer = renderer.tokenizer
        if tokenizer.eos_token is None:
            raise InvalidInput("has no end token, with which answers end", field="tokenizer")
        named = (tokenizer.convert_ids_to_tokens(token) for token in config.eos_token_ids)
        self._ends = list(dict.fromkeys((tokenizer.eos_token, *filter(None, named))))
        self._before_answer = _before_answer(renderer) if template == "chat" else ""
        self._whole = template == "plain" or _tokenises_alike(renderer)

    @classmethod
    def from_checkpoint(
        cls, folder: str | pathlib.Path, *, max_length: int | None = None, template: Template = "chat"
    ) -> ConversationEncoder:
        config = FocusLlavaConfig.load(folder)
        renderer = PromptRenderer.from_checkpoint(
            folder,
            image_token_id=config.image_token_id,
            context=config.text_config.max_position_embeddings,
            instruction="all_turns",
        )
        return cls(config, renderer, max_length=max_length, template=template)

    def tiles(self, data: bytes) -> ImageTiles:
        """An image file's tiles, as serving cuts them. Raises EntryFault."""
        try:
            tiles, _ = read_tiles(data, self.config)
        except TooLarge as error:
            raise EntryFault("image_size", str(error)) from None
        except InvalidInput as error:
            raise EntryFault("image_size" if "narrower" in str(error) else "corrupt_image", str(error)) from None
        if not any_map_left(tiles, self.config.patches_per_side):
            height, width = tiles.image_size_hw
            raise EntryFault("image_size", f"is {width} x {height} pixels, too narrow a strip for the grid")
        return tiles

    def encode(
        self, conversation: Conversation, images: Sequence[ImageTiles], name: str = "", number: int = 0
    ) -> Encoded:
        """The sequence of a whole conversation: labels are the answers with their end tokens, the instruction is the
        words of all the user's turns.

        Too long a conversation is cut off at the end; an image is in it wholly or, with the turns that ask about it,
        not at all. Raises EntryFault.
        """
        text, spans, unended = self._spell(conversation)
        ids, labels, asked = self._tokenise(text, spans, unended)
        placeholder = self.renderer.image_token_id
        if ids.count(placeholder) != len(images):
            raise EntryFault("malformed", f"{ids.count(placeholder)} of {len(images)} images are in its prompt")
        visual = (visual_tokens(tiles, self.config.patches_per_side) for tiles in images)
        ends = list(itertools.accumulate(next(visual) if token == placeholder else 1 for token in ids))
        fits = sum(end <= self.max_length for end in ends)
        kept = next((n for n in range(fits, 0, -1) if labels[n - 1] != IGNORED), 0)
        if not kept:
            raise EntryFault("too_long", f"{ends[-1]} tokens, of which the first {self.max_length} hold no answer")
        last = next(n for n in range(len(ids), 0, -1) if labels[n - 1] != IGNORED)
        sequence = TrainedSequence(
            input_ids=torch.tensor(ids[:kept]),
            labels=torch.tensor(labels[:kept]),
            instruction=torch.tensor(asked[:kept]),
            images=tuple(images[: ids[:kept].count(placeholder)]),
            name=name,
            number=number,
        )
        return Encoded(sequence=sequence, tokens=ends[kept - 1], cut=ends[last - 1] - ends[kept - 1])

    def _spell(self, conversation: Conversation) -> tuple[str, list[tuple[int, int, str]], set[int]]:
        """The conversation's text, in order the spans of the user's words ("user") and of what is learnt ("assistant":
        an answer, from the end of the prompt that asks for it to its end token), and where answers end that the
        template puts no end token behind."""
        if self.template == "plain":
            return self._spell_plain(conversation)
        try:
            whole, texts = self.renderer.spell(conversation.turns, len(conversation.images))
        except InvalidInput as error:
            raise EntryFault("malformed", str(error)) from None
        spelt, spans, unended, done = "", [], set(), 0
        for n, (start, end, role) in enumerate(texts):
            spelt += whole[done:end]
            done, first = end, len(spelt) - (end - start)
            if role == "assistant" and (n + 1 == len(texts) or texts[n + 1][2] != "assistant"):
                following = whole[end : texts[n + 1][0] if n + 1 < len(texts) else len(whole)]
                tail = next((s for stop in self._ends if (s := _up_to(stop, following)) is not None), None)
                spelt += tail or ""
                done += len(tail or "")
                if tail is None and n + 1 < len(texts):
                    unended.add(len(spelt))
                elif tail is None:
                    spelt += self._ends[0]
            if role == "assistant" and spelt.endswith(self._before_answer, 0, first):
                first -= len(self._before_answer)
            spans.append((first, len(spelt), role))
        return spelt, spans, unended

    def _spell_plain(self, conversation: Conversation) -> tuple[str, list[tuple[int, int, str]], set[int]]:
        # A text of its own is rendered by no template, and must hold no special token's string either.
        mark = self.renderer.tokenizer.convert_ids_to_tokens(self.renderer.image_token_id)
        text, spans = mark * len(conversation.images), []
        for turn in conversation.turns:
            if turn.role == "assistant":
                said = "".join(part.text for part in turn.parts if isinstance(part, TextPart))
                start = len(text)
                text += self.renderer.broken(said) + "\n"
                spans.append((start, len(text), "assistant"))
        return text, spans, set()

    def _tokenise(
        self, text: str, spans: list[tuple[int, int, str]], unended: set[int]
    ) -> tuple[list[int], list[int], list[bool]]:
        """Token ids, and of each its label and whether it is one of the user's words.

        Behind an answer that the template ends with nothing, the text goes on as it is served; the label of what stands
        there is the end token, which is what the model is to say.
        """
        starts = [0] if self._whole else [0, *(start for start, _, role in spans if role == "assistant" and start)]
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, end in zip(starts, (*starts[1:], len(text)), strict=True):
            piece, places = self.renderer.tokenise(text[start:end], begins=start == 0)
            ids += piece
            offsets += [(start + first, start + last) for first, last in places]
        covering = list(spans_by_token(offsets, spans))
        ends = set(self.renderer.tokenizer.convert_tokens_to_ids(self._ends))
        end_id = self.renderer.tokenizer.convert_tokens_to_ids(self._ends[0])
        labels, asked = [], []
        for token, roles, (first, _) in zip(ids, covering, offsets, strict=True):
            if token in self.renderer.special_ids and roles and (token not in ends or "assistant" not in roles):
                raise EntryFault("malformed", "holds text parts that together spell a special token")
            ends_here = first in unended and not roles and token != self.renderer.image_token_id
            labels.append(token if "assistant" in roles else end_id if ends_here else IGNORED)
            asked.append("user" in roles and "assistant" not in roles)
        return ids, labels, asked


def visual_tokens(tiles: ImageTiles, patches_per_side: int) -> int:
    """Visual tokens of an image with no sampler at work: base tile, rows of the map, a newline each."""
    rows, cols = (along * patches_per_side for along in tiles.grid_hw)
    top, bottom, left, right = unpadded_hw(tiles.image_size_hw, (rows, cols))
    return patches_per_side**2 + (bottom - top) * (right - left + 1)


def _up_to(stop: str, text: str) -> str | None:
    """The text up to and with `stop`, if nothing but white space stands before it."""
    before, found, _ = text.partition(stop)
    return before + found if found and not before.strip() else None


def _asked(answer: str) -> list[PromptTurn]:
    words = (TextPart(text="?"),), (TextPart(text=answer),)
    return [PromptTurn(role=role, parts=parts) for role, parts in zip(("user", "assistant"), words, strict=True)]


def _before_answer(renderer: PromptRenderer) -> str:
    """What the template puts between the prompt that asks for an answer and the answer itself."""
    prompt = _prompt(renderer)
    whole, spans = renderer.spell(_asked("!"), 0)
    if not whole.startswith(prompt):
        raise InvalidInput("puts an answer elsewhere than behind the prompt that asks for it", field="chat_template")
    return whole[len(prompt) : spans[-1][0]]


def _prompt(renderer: PromptRenderer) -> str:
    asked = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    return renderer.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)


def _tokenises_alike(renderer: PromptRenderer) -> bool:
    """Whether a prompt and its answer in one text have the tokens that the prompt has alone.

    They have not where the prompt ends with what merges with an answer's first letters. Elsewhere one text is right
    for every tokenizer, also for those that put a space before whatever begins.
    """
    prompt = _prompt(renderer)
    alone, _ = renderer.tokenise(prompt)
    wholes = [renderer.tokenise(renderer.spell(_asked(probe), 0)[0])[0] for probe in _PROBES]
    return all(whole[: len(alone)] == alone for whole in wholes)
