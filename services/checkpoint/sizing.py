"""What a checkpoint needs of a device, and how its memory is shared out: arithmetic over the config, nothing is loaded.

A *full image* is a request of one image of the most visual tokens, a question and an answer of the default length, with
nothing pruned: no request about one image holds more. What cannot answer one is refused.

Legend: C and F widths of the vision tower, D and F of the decoder, N visual tokens of a full image, V vocabulary.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

from focusllava.sizes import size_text
from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.supported import TEXT_TOKENS, check_context, head_width, largest_image
from services.common.errors import InvalidInput
from services.common.types import SamplingParams
from services.compute.dtypes import dtype_name

BLOCK_SIZE = 16
"""Tokens of one block of the KV cache."""
PROCESS_BYTES = 450 * 2**20
"""Python, torch and their libraries in the memory of one replica."""
CUDA_BYTES = 768 * 2**20
"""A process' context on a GPU, its kernels, and the graphs of decode steps."""
DECODING_BYTES = 384 * 2**20
"""Photographs that the encoder is decoding."""
STEP_OPERATIONS = 4e12
"""Operations of one step on a CPU: running answers wait for a step of prefill, some seconds on two cores."""


@dataclass(frozen=True, kw_only=True)
class EncoderSizes:
    """Sizes of one replica of the encoder."""

    weights: int
    """Bytes of the weights; activations are bytes too."""
    activations: int
    max_tiles: int

    @property
    def bytes(self) -> int:
        return self.weights + self.activations


@dataclass(frozen=True, kw_only=True)
class LlmSizes:
    """Sizes of one replica of the language model."""

    weights: int
    activations: int
    kv_cache_bytes: int
    max_batch_tokens: int
    max_running: int
    full_image_bytes: int
    """KV cache of a full image."""
    full_image_tokens: int

    @property
    def bytes(self) -> int:
        return self.weights + self.activations + self.kv_cache_bytes

    @property
    def settings(self) -> dict[str, Any]:
        """The sizes that are settings of the engine (`services.llm.engine_config.EngineConfig`), by name."""
        return {name: getattr(self, name) for name in ("kv_cache_bytes", "max_batch_tokens", "max_running")}

    @property
    def full_images(self) -> int:
        """How many requests of a full image run at a time."""
        return min(self.max_running, self.kv_cache_bytes // self.full_image_bytes)


def block_bytes(config: FocusLlavaConfig, dtype: torch.dtype) -> int:
    """Bytes of one block of the KV cache through all layers, the hidden states beside it included."""
    text = config.text_config
    a_layer = 2 * text.num_key_value_heads * head_width(text)
    return BLOCK_SIZE * (text.num_hidden_layers * a_layer + text.hidden_size) * dtype.itemsize


def full_image(config: FocusLlavaConfig, dtype: torch.dtype, max_model_len: int | None = None) -> tuple[int, int]:
    """(tokens, bytes of KV cache) of a full image, its answer cut off by the context."""
    context = max_model_len or config.text_config.max_position_embeddings
    tokens = min(largest_image(config)[1] + TEXT_TOKENS + SamplingParams().max_tokens, context)
    return tokens, -(-tokens // BLOCK_SIZE) * block_bytes(config, dtype)


def tiles_of_an_image(config: FocusLlavaConfig) -> int:
    """Most tiles that one image is cut into, the base tile included."""
    return 1 + max(height * width for height, width in config.image_grid_pinpoints) // config.tile_px**2


def default_tiles(*, on_gpu: bool) -> int:
    """Most tiles in one pass of the vision tower."""
    return 80 if on_gpu else 20


def size_encoder(
    config: FocusLlavaConfig,
    elements: int,
    *,
    dtype: torch.dtype,
    on_gpu: bool,
    room: int = sys.maxsize,
    max_tiles: int | None = None,
) -> EncoderSizes:
    """elements: numbers of all its weights (`store.stage_elements`); room: bytes of the device, of which batches take a
    16th unless one image needs more; max_tiles: of a batch, where it is said."""
    vision, width = config.vision_config, config.text_config.hidden_size
    patches = config.patches_per_side**2
    inner = (patches + 1) * (6 * vision.hidden_size + 2 * vision.intermediate_size)  # type: ignore[operator]
    a_tile = (inner + 3 * patches * width) * dtype.itemsize + 2 * 3 * config.tile_px**2 * 4
    tiles = max_tiles or max(tiles_of_an_image(config), min(default_tiles(on_gpu=on_gpu), room // 16 // a_tile))
    return EncoderSizes(
        weights=elements * dtype.itemsize,
        activations=tiles * a_tile + DECODING_BYTES + (CUDA_BYTES if on_gpu else PROCESS_BYTES),
        max_tiles=tiles,
    )


def size_llm(
    config: FocusLlavaConfig,
    elements: int,
    *,
    dtype: torch.dtype,
    on_gpu: bool,
    budget: int | None,
    where: str = "",
    kv_cache_bytes: int | None = None,
    max_batch_tokens: int | None = None,
    max_running: int | None = None,
    max_model_len: int | None = None,
) -> LlmSizes:
    """Shares `budget` bytes out; what is given is taken as it is.

    elements: numbers of all its weights (`store.stage_elements`); budget: None, with a kv_cache_bytes, asks nothing of
    the memory and refuses no KV cache; where: what has the budget, for the error.
    Raises InvalidInput for what could never answer a full image, with what it would need.
    """
    text = config.text_config
    if max_model_len is not None:
        check_max_model_len(config, max_model_len)
    as_stored = getattr(torch, config.dtype) == dtype
    weights = elements * dtype.itemsize
    if not on_gpu:  # a tied head is packed beside the embeddings; these stay in their file where they can
        weights += (text.tie_word_embeddings - as_stored) * text.vocab_size * text.hidden_size * dtype.itemsize
    tokens, a_request = full_image(config, dtype, max_model_len)
    if kv_cache_bytes is not None and budget is not None:
        check_kv_cache(config, kv_cache_bytes, tokens, a_request)
    step_tokens = max_batch_tokens or (4096 if on_gpu else _cpu_step_tokens(elements))
    most = max_running or (128 if on_gpu else 16)
    while True:
        activations = _activations(config, dtype, step_tokens, most, on_gpu)
        left = sys.maxsize if budget is None else budget - weights - activations
        # A quarter of what runs may be full images: questions without one, and pruned prompts, are smaller.
        if max_running or most == 1 or left >= (kv_cache_bytes or max(1, most // 4) * a_request):
            break
        most //= 2
    if budget is not None and left < (kv_cache_bytes or a_request):
        needed = weights + activations + (kv_cache_bytes or a_request)
        raise InvalidInput(
            f"{where} has {size_text(budget)} for the language model, {size_text(needed)} are needed to answer "
            f"{_image(config)}: {size_text(weights)} of weights in {dtype_name(dtype)}, {size_text(activations)} to "
            f"compute in, {size_text(kv_cache_bytes or a_request)} of KV cache"
            + ("" if kv_cache_bytes else f" for its {tokens:,} tokens"),
            field="memory",
        )
    # On a CPU more cache than requests can fill would only be taken from everybody else.
    return LlmSizes(
        weights=weights,
        activations=activations,
        kv_cache_bytes=kv_cache_bytes or (left if on_gpu else min(left, 2 * most * a_request)),
        max_batch_tokens=step_tokens,
        max_running=most,
        full_image_bytes=a_request,
        full_image_tokens=tokens,
    )


def check_kv_cache(config: FocusLlavaConfig, kv_cache_bytes: int, tokens: int, full_image_bytes: int) -> None:
    """Raises InvalidInput for a KV cache that cannot hold a full image, which is so many tokens and bytes."""
    if kv_cache_bytes < full_image_bytes:
        raise InvalidInput(
            f"is {size_text(kv_cache_bytes)}, expected {size_text(full_image_bytes)} ({full_image_bytes} bytes) or "
            f"more: {_image(config)} with its question and answer is {tokens:,} tokens",
            field="kv_cache_bytes",
        )


def check_max_model_len(config: FocusLlavaConfig, max_model_len: int) -> None:
    """Raises InvalidInput for a context beyond the model's own, or too short for a full image's prompt."""
    own = config.text_config.max_position_embeddings
    if max_model_len > own:
        raise InvalidInput(f"is {max_model_len}, expected {own} or less: the model's own", field="max_model_len")
    check_context(config, max_model_len, "max_model_len")


def _image(config: FocusLlavaConfig) -> str:
    (height, width), _ = largest_image(config)
    return f"one image of {width} x {height} px"


def _cpu_step_tokens(elements: int) -> int:
    """A power of two from 128 to 1,024."""
    wanted = STEP_OPERATIONS / (2 * max(elements, 1))
    return next((tokens for tokens in (1024, 512, 256) if tokens <= wanted), 128)


def _activations(config: FocusLlavaConfig, dtype: torch.dtype, step_tokens: int, running: int, on_gpu: bool) -> int:
    """Most bytes of a step's activations, and of the visual tokens of requests that wait."""
    text, (_, visual) = config.text_config, largest_image(config)
    heads = (text.num_attention_heads + 2 * text.num_key_value_heads) * head_width(text)
    step = step_tokens * (6 * text.hidden_size + 2 * heads + 3 * text.intermediate_size) * dtype.itemsize
    logits = 6 * running * text.vocab_size * 4
    # The choice of what to keep: `SCORED_QUERIES` rows of float32 scores a head, twice.
    choice = 2 * min(256, TEXT_TOKENS) * visual * text.num_attention_heads * 4
    if on_gpu:
        return step + logits + choice + CUDA_BYTES
    held = 2 * running * visual * text.hidden_size * dtype.itemsize
    converted = getattr(torch, config.dtype) != dtype
    loading = converted * text.vocab_size * text.hidden_size * dtype.itemsize  # the head, beside its packed form
    return max(step + logits + choice + held, loading) + PROCESS_BYTES
