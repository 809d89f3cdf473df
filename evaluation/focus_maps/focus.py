"""What the samplers chose for images and a question, read from a LocalModel's answers.

Legend: S tokens of a prompt, D width, H/G query/key heads, d head width, N visual tokens of all images of a question,
L layers, K = L - 1 layers before which pruning is possible (1..L-1).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from PIL import Image

from focusllava.focus_maps import FocusMap, FocusMaps
from focusllava.messages import Settings, Usage
from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.finding import find_checkpoint
from services.common.errors import InvalidInput
from services.common.media import open_image
from services.common.types import CompressedVisualTokens
from services.compute.dtypes import dtype_name, dtype_of_stored
from services.encoder.pipeline import EncoderPipeline
from services.llm.engine import Engine
from services.llm.kernels import Kernels
from services.local.maps import image_map
from services.local.model import LocalModel
from services.text.prompt import Prompt

MOST_KV_CACHE_BYTES = 2**31


@dataclass(frozen=True, kw_only=True)
class EncodedPicture:
    """An image as the encoder stage left it."""

    file: bytes
    vision_sampler: bool
    """Whether the vision-guided sampler was asked for."""
    picture: Image.Image
    """RGB, upright, all pixels."""
    tokens: CompressedVisualTokens
    map: FocusMap
    """The vision-guided sampler's choice and where each visual token lies, before a question is asked."""


@dataclass(frozen=True, kw_only=True)
class Focus:
    """One question's answer, and what of its images the language model looked at."""

    question: str
    answer: str
    pictures: tuple[EncodedPicture, ...]
    maps: FocusMaps
    """The engine's own choices, a map an image."""
    importance_KN: torch.Tensor
    """float32: row k - 1 is S_j of Eq. 8, had the model pruned before layer k. All images' tokens in order."""
    usage: Usage

    def of_picture(self, values_N: torch.Tensor, index: int) -> torch.Tensor:
        """One image's part of something that has an entry a visual token, along the last dimension."""
        return values_N.split([len(one.boxes) for one in self.maps.maps], dim=-1)[index]


class FocusModel:
    """Both stages of one checkpoint. `encode` once an image, `ask` once a question."""

    def __init__(self, checkpoint: str | os.PathLike[str], *, device: str = "cpu", **engine: Any):
        """engine: as for LocalModel. kv_cache_bytes bounds the longest prompt (TooLarge says what it needs); unless it
        is given, there is room for a prompt that fills the context, up to MOST_KV_CACHE_BYTES."""
        config = FocusLlavaConfig.load(folder := find_checkpoint(checkpoint))
        text = config.text_config
        # At most 4 bytes a number; K and V as wide as the queries at most, and the hidden states beside them.
        token_bytes = 4 * text.hidden_size * (2 * text.num_hidden_layers + 1)
        context = text.max_position_embeddings
        defaults = {
            "dtype": dtype_name(dtype_of_stored(config.dtype, device)),
            "kv_cache_bytes": min(context * token_bytes, MOST_KV_CACHE_BYTES),
        }
        # With no prefix reuse and room for any prompt in one chunk, importance by layer and the engine's decision come
        # from equal passes.
        exact = {"max_batch_tokens": context, "prefix_reuse": False}
        self.local = LocalModel(folder, device, **{**defaults, **engine, **exact})

    @property
    def pipeline(self) -> EncoderPipeline:
        """The encoder stage."""
        return self.local.pipeline

    def encode(self, image: bytes, *, vision_sampler: bool = True) -> EncodedPicture:
        """An image file through the encoder stage. Raises InvalidInput or TooLarge naming what is wrong with it."""
        (tokens,) = self.local.encode([image], vision_sampler=vision_sampler)
        where = image_map(tokens, self.pipeline.config, sampled=vision_sampler)
        # The encoder may have decoded a JPEG at reduced scale; a map is drawn over every pixel.
        picture = open_image(image, self.pipeline.limits).image
        return EncodedPicture(file=image, vision_sampler=vision_sampler, picture=picture, tokens=tokens, map=where)

    def ask(self, pictures: Sequence[EncodedPicture], question: str, **settings: Unpack[Settings]) -> Focus:
        """A greedy answer of at most 64 tokens, unless the settings say otherwise, and what it was read from.

        All pictures were encoded alike. Raises InvalidInput where there is no image or no question.
        """
        if not pictures:
            raise InvalidInput("is empty, expected one or more", field="images")
        if not question.strip():
            raise InvalidInput("has no words to score visual tokens by", field="question")
        sampled = pictures[0].vision_sampler
        asked: Settings = {"max_tokens": 64, **settings, "vision_sampler": sampled, "return_map": True}
        answer = self.local.ask([picture.file for picture in pictures], question, **asked)
        assert answer.focus is not None, "it was asked for"
        visual_ND = torch.cat([picture.tokens.tokens_ND for picture in pictures])
        return Focus(
            question=question,
            answer=answer.text.strip(),
            pictures=tuple(pictures),
            maps=answer.focus,
            importance_KN=importance_by_layer(self.local.engine, answer.prompt, visual_ND),
            usage=answer.usage,
        )


@dataclass(kw_only=True)
class WholePrompt:
    """An `AttentionStep` of one whole prompt: each token sees those before it, nothing is cached."""

    kernels: Kernels
    final_rows: torch.Tensor | None = None

    def attend(
        self, layer: int, query_SHd: torch.Tensor, key_SGd: torch.Tensor, value_SGd: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """See AttentionStep."""
        return self.kernels.prefill(query_SHd, key_SGd, value_SGd, [len(query_SHd)], [len(key_SGd)], scaling)


@torch.inference_mode()
def importance_by_layer(engine: Engine, prompt: Prompt, visual_ND: torch.Tensor) -> torch.Tensor:
    """Eq. 8 before each layer 1..L-1 of a pass in which no token is dropped, float32 [K, N], on the CPU.

    Where the engine prunes, this is its own decision's importance, to the bit: the same layers on the same prompt, and
    the same `Decoder.visual_importance`.
    """
    decoder = engine.decoder
    input_ids_S, visual_N = torch.tensor(prompt.input_ids), prompt.visual_positions()
    hidden_SD = decoder.embed(input_ids_S.index_fill(0, visual_N, 0).to(decoder.device))
    visual_N = visual_N.to(decoder.device)
    instruction_T = torch.tensor(prompt.instruction_positions, device=decoder.device)
    hidden_SD.index_copy_(0, visual_N, visual_ND.to(decoder.device, hidden_SD.dtype))
    rotary = decoder.rotary(torch.arange(len(hidden_SD), device=decoder.device))
    scored = torch.cat([instruction_T, visual_N])
    rotary_scored = decoder.rotary(scored)
    whole, rows = WholePrompt(kernels=engine.runner.kernels), []
    for layer in range(1, decoder.num_layers):
        hidden_SD = decoder.run_layers(hidden_SD, rotary, layer - 1, layer, whole)
        importance_N = decoder.visual_importance(hidden_SD[scored], rotary_scored, layer, len(instruction_T))
        rows.append(importance_N.cpu())
    return torch.stack(rows)
