"""Conversations and images to what the model's `forward` and `generate` take, as serving prepares them."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from services.checkpoint.config import FocusLlavaConfig
from services.common.errors import InvalidInput
from services.common.types import ImagePart, ImageTiles, PromptTurn, TextPart
from services.encoder.reading import read_tiles, tiles_of
from services.modeling.images import batched
from services.text.prompt import PromptRenderer

ImageSource = bytes | str | os.PathLike[str] | Image.Image
"""An image file's bytes or path, or an image that is decoded already."""
Messages = Sequence[Mapping[str, Any]]
"""A conversation as transformers writes it: role, and content, a text or a list of {"type": "text", "text": ...} and
{"type": "image", "image": ...}."""


class FocusLlavaProcessor(ProcessorMixin):
    """Tokenizer, chat template and tiling of one checkpoint.

    question = {"type": "text", "text": "What number is on the red card?"}
    inputs = processor([{"role": "user", "content": [{"type": "image", "image": "sample.png"}, question]}])
    print(processor.batch_decode(model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]))
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: FocusLlavaConfig, chat_template: str | None = None):
        """chat_template: in place of the tokenizer's."""
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template)
        tokenizer.chat_template = self.chat_template
        self.config = config
        self.renderer = PromptRenderer(
            tokenizer,
            image_token_id=config.image_token_id,
            context=config.text_config.max_position_embeddings,
            instruction=config.text_sampler.instruction,
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **_: Any
    ) -> FocusLlavaProcessor:
        """Reads a checkpoint's folder. Raises InvalidInput as `FocusLlavaConfig.load`."""
        folder = os.fspath(pretrained_model_name_or_path)
        config = FocusLlavaConfig.load(folder)
        renderer = PromptRenderer.from_checkpoint(folder, image_token_id=config.image_token_id, context=1)
        return cls(renderer.tokenizer, config)

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **_: Any) -> list[str]:
        """Writes the tokenizer's files and the chat template; the rest is in the model's config.json."""
        if push_to_hub:
            raise InvalidInput("is True, expected False: upload the folder", field="push_to_hub")
        pathlib.Path(save_directory).mkdir(parents=True, exist_ok=True)
        return list(self.tokenizer.save_pretrained(os.fspath(save_directory)))

    def __call__(self, conversations: Messages | Sequence[Messages], *, continue_final: bool = False,
                 padding_side: str = "left") -> BatchFeature:  # fmt: skip
        """A batch of prompts, or one: input_ids, attention_mask and instruction_mask [B, C], and the images' pixels.

        continue_final: the prompt ends with the text of the last turn, the assistant's.
        padding_side: "left" for `generate`, or "right".

        Raises InvalidInput naming what is wrong with a conversation or an image.
        """
        many: Sequence[Any] = conversations if conversations and not _is_message(conversations[0]) else [conversations]
        if not all(many):
            raise InvalidInput("is empty, expected a conversation or several", field="conversations")
        images: list[ImageTiles] = []
        rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        for messages in many:
            turns, own = self._turns(messages)
            prompt = self.renderer.render(turns, [1] * len(own), continue_final=continue_final)
            asks = torch.zeros(len(prompt.input_ids), dtype=torch.bool)
            asks[list(prompt.instruction_positions)] = True
            rows.append((torch.tensor(prompt.input_ids), asks))
            images += own
        longest = max(len(ids) for ids, _ in rows)
        pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids_BC = torch.full((len(rows), longest), pad_id)
        real_BC, asks_BC = torch.zeros_like(ids_BC), torch.zeros_like(ids_BC, dtype=torch.bool)
        for row, (ids, asks) in enumerate(rows):
            place = slice(longest - len(ids), None) if padding_side == "left" else slice(len(ids))
            ids_BC[row, place], real_BC[row, place], asks_BC[row, place] = ids, 1, asks
        data = {"input_ids": ids_BC, "attention_mask": real_BC, "instruction_mask": asks_BC}
        if images:
            data["pixel_values"], data["image_sizes"] = batched(images)
        return BatchFeature(data)

    def _turns(self, messages: Messages) -> tuple[list[PromptTurn], list[ImageTiles]]:
        images: list[ImageTiles] = []
        turns = []
        for number, message in enumerate(messages):
            content = message["content"]
            parts: list[TextPart | ImagePart] = []
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] == "text":
                    parts.append(TextPart(text=part["text"]))
                elif part["type"] == "image":
                    parts.append(ImagePart(image=len(images)))
                    source = next((part[key] for key in ("image", "path", "data") if key in part), None)
                    images.append(self.tiles(source, field=f"messages[{number}].image"))
                else:
                    raise InvalidInput(f"is {part['type']!r}, expected text or image", field=f"messages[{number}].type")
            turns.append(PromptTurn(role=message["role"], parts=tuple(parts)))
        return turns, images

    def tiles(self, source: ImageSource | None, *, field: str = "image") -> ImageTiles:
        """An image cut for the vision tower. Raises InvalidInput or TooLarge naming `field`."""
        if isinstance(source, Image.Image):
            return tiles_of(source.convert("RGB"), self.config)
        if isinstance(source, str | os.PathLike):
            try:
                source = pathlib.Path(source).read_bytes()
            except OSError as error:
                raise InvalidInput(f"cannot be read: {error}", field=field) from None
        if not isinstance(source, bytes):
            raise InvalidInput(f"is {source!r:.80}, expected a path, bytes or an image of Pillow's", field=field)
        return read_tiles(source, self.config, field=field)[0]


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value
