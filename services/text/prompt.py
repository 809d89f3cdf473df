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
from typing import Any, TypeVar

import jinja2
import torch
from transformers import AutoTokenizer, LlavaNextConfig

from services.checkpoint.config import Instruction
from services.common.errors import InvalidInput
from services.common.types import ImagePart, PromptTurn
from services.text.turns import (
    check_turns,
    has_words,
    join_all_system_turns,
    join_leading_system_turns,
    last_user_turn,
)

T = TypeVar("T")
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
    role: str
    """The role of the turn that it stands in."""
    instruction: bool
    begins_answer: bool = False
    """The text is the last turn's, and the answer goes on from it."""


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
        self.special_ids = set(named) - ({tokenizer.unk_token_id} - {image_token_id})
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

    def render(
        self, turns: Sequence[PromptTurn], image_tokens: Sequence[int], *, continue_final: bool = False
    ) -> Prompt:
        """The prompt of a conversation. image_tokens: visual tokens of each image, in order; continue_final: the prompt
        ends with the text of the last turn, the assistant's.

        Leading system turns are joined. Later ones stay in place where the template renders them, otherwise they are
        joined to the leading ones. Raises InvalidInput: what `check_turns` raises, turns that the template refuses, or
        a prompt that leaves no room in the context.
        """
        prompt, spans = self._spell(turns, len(image_tokens), continue_final)
        if continue_final:
            prompt = prompt[: spans[-1][1]]
        return self._expand(*self.tokenise(prompt), spans, image_tokens)

    def spell(self, turns: Sequence[PromptTurn], num_images: int) -> tuple[str, list[tuple[int, int, str]]]:
        """A finished conversation, which ends with an answer, as `render` and the template write it, and the span of
        characters and the role of each text in it, in order.

        Raises InvalidInput as `render`, but for the room in the context.
        """
        whole, spans = self._spell(turns, num_images, True)
        return whole, [(start, end, text.role) for start, end, text in spans]

    def _spell(
        self, turns: Sequence[PromptTurn], num_images: int, continue_final: bool
    ) -> tuple[str, list[tuple[int, int, _Text]]]:
        """The template's text, with what it puts after the last turn, and where the turns' own texts are in it."""
        check_turns(turns, num_images, continue_final=continue_final)
        turns = join_leading_system_turns(turns)
        if any(turn.role == "system" for turn in turns[1:]) and not self._renders(turns, continue_final):
            turns = join_all_system_turns(turns)
        texts: list[_Text] = []
        real, marked = self._messages(turns, texts, continue_final)
        with self._lock:
            prompt, template = self._apply(real, continue_final), self._apply(marked, continue_final)
        spans = _align(prompt, template, texts)
        if spans is None:
            raise InvalidInput("changes the messages' texts in a way that cannot be followed", field="chat_template")
        return prompt, spans

    def broken(self, text: str) -> str:
        """A text that holds no special token's string: a zero-width space stands in each."""
        return self._special.sub(lambda m: m[0][0] + ZERO_WIDTH_SPACE + m[0][1:], text)

    def render_raw(self, prompt: str | Sequence[int]) -> Prompt:
        """A prompt without images that is a text already, whose special tokens count, or token ids.

        Raises InvalidInput: an id that is the image placeholder's, no token at all, or no room in the context.
        """
        if isinstance(prompt, str):
            name = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
            ids, _ = self.tokenise(prompt.replace(name, name[0] + ZERO_WIDTH_SPACE + name[1:]))
        else:
            ids = list(prompt)
            if self.image_token_id in ids:
                raise InvalidInput(
                    "is the image placeholder: a raw prompt has no images",
                    field=f"raw_prompt.token_ids[{ids.index(self.image_token_id)}]",
                )
        if not ids:
            raise InvalidInput("makes a prompt of no tokens", field="raw_prompt")
        self._check_room(len(ids), 0, "raw_prompt")
        return Prompt(input_ids=tuple(ids), visual_spans=(), instruction_positions=())

    def tokenise(self, prompt: str, *, begins: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """A prompt's token ids and the span of characters of each.

        begins: the tokenizer's special tokens are added, unless the template has begun with BOS already, as
        transformers' processor does; False for what goes on from other tokens.
        """
        bos = self.tokenizer.bos_token
        with self._lock:
            encoded = self.tokenizer(
                prompt,
                add_special_tokens=begins and not (bos is not None and prompt.startswith(bos)),
                return_offsets_mapping=True,
                verbose=False,
            )
        return encoded["input_ids"], encoded["offset_mapping"]

    def _renders(self, turns: Sequence[PromptTurn], continue_final: bool) -> bool:
        """Whether the template takes these turns and shows each of their texts once and in order."""
        texts: list[_Text] = []
        _, marked = self._messages(turns, texts, continue_final)
        try:
            with self._lock:
                shown = SENTINEL.findall(self._apply(marked, continue_final))
        except InvalidInput:
            return False
        return shown == [chr(FIRST_SENTINEL + index) for index in range(len(texts))]

    def _messages(
        self, turns: Sequence[PromptTurn], texts: list[_Text], continue_final: bool
    ) -> tuple[list[Any], list[Any]]:
        last_user = last_user_turn(turns)
        real: list[Any] = []
        marked: list[Any] = []
        for index, turn in enumerate(turns):
            chosen = turn.role == "user" and (self.instruction == "all_turns" or index == last_user) and has_words(turn)
            begins_answer = continue_final and index == len(turns) - 1
            contents: tuple[list[Any], list[Any]] = ([], [])
            for part in turn.parts:
                if isinstance(part, ImagePart):
                    shown: tuple[Any, Any] = ({"type": "image"}, {"type": "image"})
                else:
                    text = self.broken(part.text)
                    sentinel = chr(FIRST_SENTINEL + len(texts))
                    texts.append(_Text(text=text, role=turn.role, instruction=chosen, begins_answer=begins_answer))
                    shown = ({"type": "text", "text": text}, {"type": "text", "text": sentinel})
                for content, entry in zip(contents, shown, strict=True):
                    content.append(entry)
            real.append({"role": turn.role, "content": contents[0]})
            marked.append({"role": turn.role, "content": contents[1]})
        if len(texts) > 0xFFFD:
            raise InvalidInput(f"hold {len(texts)} texts, at most {0xFFFD}", field="turns")
        return real, marked

    def _apply(self, messages: list[Any], continue_final: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=not continue_final
            )
        except jinja2.TemplateError as error:
            raise InvalidInput(f"are refused by the model's chat template: {error}", field="turns") from None

    def _expand(
        self,
        ids: list[int],
        offsets: list[tuple[int, int]],
        spans: list[tuple[int, int, _Text]],
        image_tokens: Sequence[int],
    ) -> Prompt:
        self._check_room(len(ids) - len(image_tokens), sum(image_tokens), "turns")
        covering = spans_by_token(offsets, spans)
        input_ids: list[int] = []
        visual_spans: list[tuple[int, int]] = []
        instruction: list[int] = []
        answer: list[int] = []
        for token, texts in zip(ids, covering, strict=True):
            if texts and token in self.special_ids:
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
            if any(text.begins_answer for text in texts):
                answer.append(len(input_ids))
            input_ids.append(token)
        if len(visual_spans) != len(image_tokens):
            raise InvalidInput("does not place each image exactly once", field="chat_template")
        if self.instruction == "to_answer" and instruction:
            # What begins the answer does not ask: the same tokens are kept as if the model had begun it so.
            after = range(instruction[-1] + 1, answer[0] if answer else len(input_ids))
            instruction += [p for p in after if input_ids[p] != self.image_token_id]
        return Prompt(
            input_ids=tuple(input_ids),
            visual_spans=tuple(visual_spans),
            instruction_positions=tuple(instruction),
        )

    def _check_room(self, text_tokens: int, visual_tokens: int, field: str) -> None:
        if text_tokens + visual_tokens >= self.context:
            raise InvalidInput(
                f"make a prompt of {text_tokens + visual_tokens} tokens ({visual_tokens} of them visual), "
                f"which leaves no room for an answer in the model's context of {self.context}",
                field=field,
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


def spans_by_token(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int, T]]) -> Iterator[list[T]]:
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
