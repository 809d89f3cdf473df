"""Chat turns to a prompt: template, token ids, where the visual tokens go, and which tokens are the user's own words.

The template is rendered twice: once with the real texts, which gives the string that transformers' processor would
tokenise, and once with one private-use character in place of each text, which tells where each text went. A user's text
that contains the string of a special token ("<image>", "</s>") is broken by a zero-width space after its first
character, so that it stays text.
"""

from __future__ import annotations

import pathlib
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import torch
from transformers import AutoTokenizer, LlavaNextConfig

from services.checkpoint.config import Instruction
from services.common.errors import InvalidInput
from services.common.types import ChatTurn, ImagePart

ROLES = ("system", "user", "assistant")
ZERO_WIDTH_SPACE = "\u200b"
FIRST_SENTINEL = 0xF0000
SENTINEL = re.compile("[\U000f0000-\U000ffffd]")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Token ids ready for layer 0; every image's placeholder is repeated once a visual token."""

    input_ids: tuple[int, ...]
    visual_spans: tuple[tuple[int, int], ...]
    """An image: first position and one past the last, in order; they index `input_ids`."""
    instruction_positions: tuple[int, ...]
    """Positions of the tokens whose attention chooses the visual tokens (method, section 2)."""

    def visual_positions(self) -> torch.Tensor:
        """int64 [N]: positions of all images' visual tokens."""
        spans = [torch.arange(first, last) for first, last in self.visual_spans]
        return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class _Text:
    text: str
    instruction: bool


class PromptRenderer:
    """Renders prompts with one checkpoint's tokenizer and chat template. Thread-safe."""

    def __init__(self, tokenizer: Any, *, image_token_id: int, context: int, instruction: Instruction = "last_turn"):
        """instruction: which tokens choose the visual tokens; see `services.checkpoint.config.TextSamplerConfig`."""
        if not tokenizer.is_fast:
            raise InvalidInput("has no fast (tokenizer.json) version, which token offsets need", field="tokenizer")
        if not tokenizer.chat_template:
            raise InvalidInput("is missing from the checkpoint's folder", field="chat_template.jinja")
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id
        self.context = context
        self.instruction = instruction
        self._lock = threading.Lock()  # a fast tokenizer refuses concurrent calls ("Already borrowed")
        # A tokenizer.json may know more special tokens than the tokenizer names, and a template may use added ones.
        named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        for token_id, added in tokenizer.added_tokens_decoder.items():
            if added.special or (added.content.strip() and added.content in tokenizer.chat_template):
                named[token_id] = added.content
        named[image_token_id] = tokenizer.convert_ids_to_tokens(image_token_id)
        strings = set(named.values())
        self._special_ids = set(named) - ({tokenizer.unk_token_id} - {image_token_id})
        self._special = re.compile("|".join(re.escape(s) for s in sorted(strings, key=len, reverse=True)))

    @classmethod
    def from_checkpoint(
        cls, folder: str | pathlib.Path, *, image_token_id: int, context: int, instruction: Instruction = "last_turn"
    ) -> PromptRenderer:
        # The class is chosen as transformers' LLaVA-NeXT processor chooses it; our own model type it does not know.
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), config=LlavaNextConfig(), local_files_only=True, trust_remote_code=False
        )
        return cls(tokenizer, image_token_id=image_token_id, context=context, instruction=instruction)

    def render(self, turns: Sequence[ChatTurn], image_tokens: Sequence[int]) -> Prompt:
        """turns to a prompt; image_tokens: visual tokens of each image, in order.

        Raises InvalidInput: unknown role, last turn not the user's, no question, an image not used exactly once in
        order, or a prompt that leaves no room in the context.
        """
        _check_turns(turns, len(image_tokens))
        texts: list[_Text] = []
        real, marked = self._messages(turns, texts)
        with self._lock:
            prompt, template = self._apply(real), self._apply(marked)
            # transformers' processor adds special tokens unless the template already begins with BOS.
            bos = self.tokenizer.bos_token
            encoded = self.tokenizer(
                prompt,
                add_special_tokens=not (bos is not None and prompt.startswith(bos)),
                return_offsets_mapping=True,
                verbose=False,
            )
        spans = _align(prompt, template, texts)
        if spans is None:
            raise InvalidInput("changes the messages' texts in a way that cannot be followed", field="chat_template")
        return self._expand(encoded["input_ids"], encoded["offset_mapping"], spans, image_tokens)

    def _messages(self, turns: Sequence[ChatTurn], texts: list[_Text]) -> tuple[list[Any], list[Any]]:
        last_user = len(turns) - 1
        real: list[Any] = []
        marked: list[Any] = []
        for index, turn in enumerate(turns):
            chosen = turn.role == "user" and (self.instruction == "all_turns" or index == last_user)
            contents: tuple[list[Any], list[Any]] = ([], [])
            for part in turn.parts:
                if isinstance(part, ImagePart):
                    shown: tuple[Any, Any] = ({"type": "image"}, {"type": "image"})
                else:
                    text = self._special.sub(lambda m: m[0][0] + ZERO_WIDTH_SPACE + m[0][1:], part.text)
                    sentinel = chr(FIRST_SENTINEL + len(texts))
                    texts.append(_Text(text=text, instruction=chosen))
                    shown = ({"type": "text", "text": text}, {"type": "text", "text": sentinel})
                for content, entry in zip(contents, shown, strict=True):
                    content.append(entry)
            real.append({"role": turn.role, "content": contents[0]})
            marked.append({"role": turn.role, "content": contents[1]})
        if len(texts) > 0xFFFD:
            raise InvalidInput(f"hold {len(texts)} texts, at most {0xFFFD}", field="turns")
        return real, marked

    def _apply(self, messages: list[Any]) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise InvalidInput(f"are refused by the model's chat template: {error}", field="turns") from None

    def _expand(
        self,
        ids: list[int],
        offsets: list[tuple[int, int]],
        spans: list[tuple[int, int, _Text]],
        image_tokens: Sequence[int],
    ) -> Prompt:
        total = len(ids) - len(image_tokens) + sum(image_tokens)
        if total >= self.context:
            raise InvalidInput(
                f"make a prompt of {total} tokens ({sum(image_tokens)} of them visual), "
                f"which leaves no room for an answer in the model's context of {self.context}",
                field="turns",
            )
        covering = _spans_by_token(offsets, spans)
        input_ids: list[int] = []
        visual_spans: list[tuple[int, int]] = []
        instruction: list[int] = []
        for token, texts in zip(ids, covering, strict=True):
            if texts and token in self._special_ids:
                raise InvalidInput("hold text parts that together spell a special token", field="turns")
            if token == self.image_token_id:
                if len(visual_spans) == len(image_tokens):
                    raise InvalidInput("does not place each image exactly once", field="chat_template")
                count = image_tokens[len(visual_spans)]
                visual_spans.append((len(input_ids), len(input_ids) + count))
                input_ids += [token] * count
                continue
            if any(text.instruction for text in texts):
                instruction.append(len(input_ids))
            input_ids.append(token)
        if len(visual_spans) != len(image_tokens):
            raise InvalidInput("does not place each image exactly once", field="chat_template")
        if self.instruction == "to_answer" and instruction:
            after = range(instruction[-1] + 1, len(input_ids))
            instruction += [p for p in after if input_ids[p] != self.image_token_id]
        return Prompt(
            input_ids=tuple(input_ids),
            visual_spans=tuple(visual_spans),
            instruction_positions=tuple(instruction),
        )


def _check_turns(turns: Sequence[ChatTurn], num_images: int) -> None:
    if not turns:
        raise InvalidInput("is empty, expected at least one user turn", field="turns")
    images: list[int] = []
    for index, turn in enumerate(turns):
        if turn.role not in ROLES:
            raise InvalidInput(f"is {turn.role!r}, expected one of {', '.join(ROLES)}", field=f"turns[{index}].role")
        found = [part.image for part in turn.parts if isinstance(part, ImagePart)]
        if found and turn.role != "user":
            raise InvalidInput(f"has an image in a {turn.role} turn, only user turns may", field=f"turns[{index}]")
        images += found
    if turns[-1].role != "user":
        raise InvalidInput(
            f"is {turns[-1].role!r}, the last turn must be the user's", field=f"turns[{len(turns) - 1}].role"
        )
    if not any(part.text.strip() for part in turns[-1].parts if not isinstance(part, ImagePart)):
        raise InvalidInput("asks nothing: the last user turn has no words", field=f"turns[{len(turns) - 1}]")
    if images != list(range(num_images)):
        raise InvalidInput(
            f"use images {images}, expected each of the request's {num_images} once and in order", field="turns"
        )


def _align(prompt: str, template: str, texts: list[_Text]) -> list[tuple[int, int, _Text]] | None:
    """Character span of each text in `prompt`, given `template`, the same rendering with a sentinel for each text.

    A template may strip a text; anything else it does to one is not followed (None).
    """
    pieces = SENTINEL.split(template)
    if not prompt.startswith(pieces[0]):
        return None
    spans, position = [], len(pieces[0])
    for sentinel, following in zip(SENTINEL.findall(template), pieces[1:], strict=True):
        entry = texts[ord(sentinel) - FIRST_SENTINEL]
        forms = (entry.text, entry.text.rstrip(), entry.text.lstrip(), entry.text.strip())
        form = next((form for form in forms if prompt.startswith(form + following, position)), None)
        if form is None:
            return None
        spans.append((position, position + len(form), entry))
        position += len(form) + len(following)
    return spans if position == len(prompt) else None


def _spans_by_token(offsets: list[tuple[int, int]], spans: list[tuple[int, int, _Text]]) -> Iterator[list[_Text]]:
    """The texts that each token overlaps; both lists ascend."""
    first = 0
    for start, end in offsets:
        while first < len(spans) and spans[first][1] <= start:
            first += 1
        texts = []
        for span_start, span_end, text in spans[first:]:
            if span_start >= end:
                break
            if span_start < span_end:
                texts.append(text)
        yield texts
