"""Two tokens of an answer about an image, by both stages on a checkpoint's own weights: what an import ends with.

What neither the config nor the shapes of tensors tell shows here: a template without a place for the image, layers that
fail in their first step, weights that are not finite.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pathlib
import re
from typing import Any

import torch
from PIL import Image

from focusllava.sizes import size_text
from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.sizing import BLOCK_SIZE, block_bytes, size_encoder, tiles_of_an_image
from services.checkpoint.store import LLM_PREFIX, fingerprint, load_stage, stage_elements
from services.checkpoint.supported import check_servable
from services.common.errors import FocusError, InvalidInput
from services.common.types import (
    CompressedVisualTokens,
    FinishedEvent,
    GenerateRequest,
    ImagePart,
    PromptTurn,
    SamplerSettings,
    SamplingParams,
    TextPart,
    TokenEvent,
)
from services.compute.dtypes import choose_dtype, dtype_name
from services.compute.memory import device_memory
from services.encoder.pipeline import EncoderPipeline
from services.llm.engine import Engine
from services.llm.engine_config import EngineConfig
from services.llm.model import Decoder
from services.text.prompt import PromptRenderer

TOKENS = 2
VISUAL_TOKENS = 64
"""Most visual tokens of the image that go into the prompt: enough to prune some of, in little time."""
_LAYER = re.compile(r"language_model\.model\.layers\.(\d+)\.")


def dry_run(folder: pathlib.Path) -> str:
    """Runs the checkpoint and says what was run. Raises InvalidInput for one that cannot answer."""
    config = FocusLlavaConfig.load(folder)
    check_servable(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = choose_dtype("auto", device)
    room = device_memory(device).free // 2
    on_gpu = device == "cuda"
    encoder_bytes = size_encoder(
        config, stage_elements(folder, "encoder"), dtype=dtype, on_gpu=on_gpu, max_tiles=tiles_of_an_image(config)
    ).bytes
    layers = _layers_that_fit(folder, config, dtype, room)
    if encoder_bytes > room or layers < 2:
        return f"not tried: {size_text(room)}, half of the memory that is free, do not hold two layers in {dtype}"
    try:
        return _run(folder, config, dtype, device, layers)
    except FocusError as error:
        raise InvalidInput(f"the new checkpoint cannot answer: {error}", field="dry run") from error
    except Exception as error:  # whatever the layers raise: it would be raised at every request
        reason = " ".join(str(error).split())
        raise InvalidInput(
            f"the new checkpoint cannot answer: {type(error).__name__}: {reason:.300}", field="dry run"
        ) from error


def _run(folder: pathlib.Path, config: FocusLlavaConfig, dtype: torch.dtype, device: str, layers: int) -> str:
    tokens = _encode(folder, dtype, device)
    engine = _engine(folder, config, dtype, device, layers)
    # What the checkpoint's template and pruning make of it, down to one visual token.
    turn = PromptTurn(role="user", parts=(ImagePart(image=0), TextPart(text="What is shown here?")))
    sampling = SamplingParams(max_tokens=TOKENS, ignore_eos=True, logprobs=1)
    samplers = SamplerSettings(keep_ratio=0.5)
    engine.submit(
        GenerateRequest(request_id="dry-run", turns=(turn,), images=(tokens,), sampling=sampling, samplers=samplers)
    )
    events: list[Any] = []
    while engine.has_work():
        events += [event for _, event in engine.step()]
    usage = next(event.usage for event in events if isinstance(event, FinishedEvent))
    chosen = [entry.chosen.logprob for event in events if isinstance(event, TokenEvent) for entry in event.logprobs]
    if usage.completion_tokens != TOKENS or not all(map(math.isfinite, chosen)):
        raise InvalidInput(f"gives log probabilities {chosen}, {usage.completion_tokens} tokens", field="llm")
    of = "all" if layers == config.text_config.num_hidden_layers else "the first"
    return (
        f"tried on {device} in {dtype_name(dtype)}: the encoder and {of} {layers} layers of "
        f"{config.text_config.num_hidden_layers} answered {TOKENS} tokens about an image"
    )


def _encode(folder: pathlib.Path, dtype: torch.dtype, device: str) -> CompressedVisualTokens:
    """An image's visual tokens, checked; the first of them."""
    pipeline = EncoderPipeline.from_checkpoint(folder, dtype=dtype, device=device)
    side = pipeline.config.tile_px
    file = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).convert("RGB").save(file, "PNG")
    (tokens,) = pipeline.encode([pipeline.prepare(file.getvalue())], [True])
    if not tokens.tokens_ND.isfinite().all():
        raise InvalidInput("makes visual tokens that are not finite", field="encoder")
    return dataclasses.replace(tokens, tokens_ND=tokens.tokens_ND[:VISUAL_TOKENS])


def _engine(folder: pathlib.Path, config: FocusLlavaConfig, dtype: torch.dtype, device: str, layers: int) -> Engine:
    """An engine on the first `layers` layers."""
    text = {**config.text, "num_hidden_layers": layers}
    if "layer_types" in text:
        text["layer_types"] = text["layer_types"][:layers]
    sampler = dataclasses.replace(config.text_sampler, enabled=True, layer=min(config.text_sampler.layer, layers - 1))
    config = dataclasses.replace(config, text=text, text_sampler=sampler)
    state = {
        name.removeprefix(LLM_PREFIX): tensor
        for name, tensor in load_stage(folder, "llm").items()
        if not (match := _LAYER.match(name)) or int(match[1]) < layers
    }
    decoder = Decoder.from_state(config.text_config, state, dtype=dtype, device=device)
    renderer = PromptRenderer.from_checkpoint(
        folder,
        image_token_id=config.image_token_id,
        context=decoder.context,
        instruction=sampler.instruction,
    )
    room = -(-1024 // BLOCK_SIZE) * block_bytes(config, dtype)
    sizes = EngineConfig(kv_cache_bytes=room, max_batch_tokens=1024, max_running=1)
    return Engine(decoder, renderer, config, fingerprint(folder), sizes)


def _layers_that_fit(folder: pathlib.Path, config: FocusLlavaConfig, dtype: torch.dtype, room: int) -> int:
    """How many of the first layers `room` bytes hold beside embeddings and head."""
    text = config.text_config
    outside = (text.vocab_size * 2 + 1) * text.hidden_size
    stored = text.vocab_size * text.hidden_size if text.tie_word_embeddings else 0
    a_layer = (stage_elements(folder, "llm") + stored - outside) / text.num_hidden_layers
    return min(text.num_hidden_layers, int((room / dtype.itemsize - outside) // a_layer))
