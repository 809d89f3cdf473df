"""With the samplers off, an imported checkpoint computes what Hugging Face's LLaVA-NeXT computes, logit for logit."""

from __future__ import annotations

import io
import itertools
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlavaNextForConditionalGeneration
from transformers.models.llava_next import modeling_llava_next
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from services.checkpoint.import_llava_next import import_llava_next
from services.common.types import (
    CompressedVisualTokens,
    GenerateRequest,
    ImageOptions,
    ImagePart,
    PromptTurn,
    SamplerSettings,
    SamplingParams,
    TextPart,
    TokenEvent,
)
from services.encoder.pipeline import EncoderPipeline
from services.llm.engine import Engine
from tests.tiny_checkpoints import FAMILIES, make_hub_checkpoint

NEW_TOKENS = 32
RELATIVE = 1e-4
SHAPES_HW = {
    "wide": (90, 300),
    "tall": (200, 61),
    "square": (112, 112),
    "tiny": (3, 5),
    "odd": (97, 131),
    "exact_grid": (28, 84),
    "one_tile": (28, 28),
    "ribbon": (7, 150),
    "column": (190, 6),
    "just_over": (57, 57),
    # Unpadding leaves no row of a map so thin: base tile only.
    "thread": (4, 396),
}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One hub checkpoint in both programs."""

    hf: Any
    processor: LlavaNextProcessor
    encoder: EncoderPipeline
    engine: Engine


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder: pathlib.Path = tmp_path_factory.mktemp(request.param)
    hub = make_hub_checkpoint(folder / "hub", request.param, seed=FAMILIES.index(request.param) + 1)
    import_llava_next(hub, folder / "ours", max_shard_bytes=150_000)
    hf, loading = LlavaNextForConditionalGeneration.from_pretrained(
        hub, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    # The folder is the hub's format in Hugging Face's own eyes: nothing in it was missing or strange.
    assert not any(loading.values()), loading
    tokenizer = AutoTokenizer.from_pretrained(hub)
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil.from_pretrained(hub),
        tokenizer,
        patch_size=hf.config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=AutoTokenizer.from_pretrained(folder / "ours").chat_template,
    )
    return Pair(
        hf=hf.eval(),
        processor=processor,
        encoder=EncoderPipeline.from_checkpoint(folder / "ours"),
        engine=Engine.from_checkpoint(folder / "ours", kv_cache_bytes=32 * 2**20),
    )


def image_bytes(shape_hw: tuple[int, int], seed: int = 0) -> bytes:
    """A smooth random picture with some noise, as a PNG file."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(shape_hw[::-1])
    pixels = np.asarray(coarse).astype(int) + rng.integers(-40, 40, (*shape_hw, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def hf_inputs(pair: Pair, turns: Sequence[PromptTurn], images: Sequence[bytes]) -> dict[str, torch.Tensor]:
    messages = [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": part.text}
                if isinstance(part, TextPart)
                else {"type": "image", "image": Image.open(io.BytesIO(images[part.image]))}
                for part in turn.parts
            ],
        }
        for turn in turns
    ]
    return pair.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def encode(pair: Pair, images: Sequence[bytes]) -> list[CompressedVisualTokens]:
    return (
        pair.encoder.encode([pair.encoder.prepare(image) for image in images], [False] * len(images)) if images else []
    )


def run_engine(pair: Pair, request: GenerateRequest) -> tuple[list[int], torch.Tensor]:
    """Tokens generated, and the logits [prompt + tokens - 1, V] of every position that went through the model."""
    decoder, run_layers = pair.engine.decoder, pair.engine.decoder.run_layers
    hidden: list[torch.Tensor] = []

    def spy(hidden_SD: torch.Tensor, rotary: Any, first: int, last: int, step: Any) -> torch.Tensor:
        wanted, step.final_rows = step.final_rows, None  # every position's, not only those that are sampled from
        result = run_layers(hidden_SD, rotary, first, last, step)
        if last == decoder.num_layers:
            hidden.append(result)
        return result if wanted is None else result[wanted]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "run_layers", spy)
        pair.engine.submit(request)
        tokens: list[int] = []
        while pair.engine.has_work():
            tokens += itertools.chain.from_iterable(
                event.token_ids for _, event in pair.engine.step() if isinstance(event, TokenEvent)
            )
    pair.engine.check_integrity()
    with torch.inference_mode():
        return tokens, decoder.logits(torch.cat(hidden))


def check_equal(pair: Pair, turns: tuple[PromptTurn, ...], images: Sequence[bytes]) -> None:
    inputs = hf_inputs(pair, turns, images)
    visual = encode(pair, images)
    prompt = pair.engine.renderer.render(turns, [len(tokens.tokens_ND) for tokens in visual])
    assert list(prompt.input_ids) == inputs["input_ids"][0].tolist()
    check_answer(pair, turns, visual, inputs)


def check_answer(
    pair: Pair, turns: tuple[PromptTurn, ...], visual: Sequence[CompressedVisualTokens], inputs: dict[str, torch.Tensor]
) -> None:
    """Greedy tokens and the logits of all positions, against transformers' for `inputs`."""
    request = GenerateRequest(
        request_id="r",
        turns=turns,
        images=tuple(visual),
        sampling=SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True),
        samplers=SamplerSettings(text_sampler=False),
    )
    tokens, logits_SV = run_engine(pair, request)

    with torch.inference_mode():
        reference = pair.hf.generate(
            **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1
        )
        assert tokens == reference[0, inputs["input_ids"].shape[1] :].tolist()
        # All positions in one pass, with no cache of its own.
        features = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
        expected_SV = pair.hf(input_ids=reference[:, :-1], **features).logits[0]
    assert logits_SV.shape == expected_SV.shape
    assert_relative(logits_SV, expected_SV)


def assert_relative(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Each row's largest difference, relative to the row's largest value."""
    error = (actual - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert error.max() < RELATIVE, f"largest relative difference {error.max():.2e} at position {int(error.argmax())}"


QUESTION = (PromptTurn(role="user", parts=(ImagePart(image=0), TextPart(text="What number is on the red card?"))),)


@pytest.mark.parametrize("shape", SHAPES_HW)
def test_logits_and_greedy_tokens_are_hugging_faces(pair: Pair, shape: str) -> None:
    check_equal(pair, QUESTION, [image_bytes(SHAPES_HW[shape])])


@pytest.mark.parametrize("shape", SHAPES_HW)
def test_tiles_and_visual_tokens_are_hugging_faces(pair: Pair, shape: str) -> None:
    data = image_bytes(SHAPES_HW[shape])
    inputs = hf_inputs(pair, QUESTION, [data])
    pixels_T3HW = pair.encoder.prepare(data).tiles.pixels_T3HW
    torch.testing.assert_close(pixels_T3HW, inputs["pixel_values"][0], rtol=1e-6, atol=1e-6)
    (tokens,) = encode(pair, [data])
    with torch.inference_mode():
        features = pair.hf.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True)
    (expected_ND,) = features.pooler_output
    assert tokens.tokens_ND.shape == expected_ND.shape
    assert tokens.uncompressed_tokens == len(expected_ND)
    assert_relative(tokens.tokens_ND, expected_ND)


@pytest.mark.parametrize("shape", ["square", "ribbon", "tiny"])
def test_low_detail_is_hugging_faces_model_given_the_base_tile_alone(
    pair: Pair, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = image_bytes(SHAPES_HW[shape])
    inputs = hf_inputs(pair, QUESTION, [data])
    # Its processor always cuts the grid; its model lays out a single tile, once it counts no more than that.
    monkeypatch.setattr(modeling_llava_next, "image_size_to_num_patches", lambda **_: 1)
    (visual,) = pair.encoder.encode([pair.encoder.prepare(data, options=ImageOptions(detail="low"))], [False])
    prompt = pair.engine.renderer.render(QUESTION, [len(visual.tokens_ND)])
    ids = torch.tensor([prompt.input_ids])
    inputs |= {"pixel_values": inputs["pixel_values"][:, :1], "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        features = pair.hf.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True)
    (expected_ND,) = features.pooler_output
    assert visual.tokens_ND.shape == expected_ND.shape and visual.uncompressed_tokens == len(expected_ND)
    assert_relative(visual.tokens_ND, expected_ND)
    check_answer(pair, QUESTION, [visual], inputs)


def test_a_fresh_vision_sampler_is_never_used(pair: Pair) -> None:
    """An import leaves it off in the config, whatever a request asks."""
    image = pair.encoder.prepare(image_bytes(SHAPES_HW["square"]))
    asked, not_asked = pair.encoder.encode([image, image], [True, False])
    assert not asked.branch_ids_M.numel()
    assert torch.equal(asked.tokens_ND, not_asked.tokens_ND)


def test_several_turns_and_images_are_hugging_faces(pair: Pair) -> None:
    turns = (
        PromptTurn(role="user", parts=(ImagePart(image=0), TextPart(text="Which word is above the circle?"))),
        PromptTurn(role="assistant", parts=(TextPart(text="The word is house."),)),
        PromptTurn(role="user", parts=(ImagePart(image=1), TextPart(text="And in this image?"))),
    )
    check_equal(pair, turns, [image_bytes((90, 300), seed=1), image_bytes((64, 40), seed=2)])


def test_no_image_is_hugging_faces(pair: Pair) -> None:
    check_equal(pair, (PromptTurn(role="user", parts=(TextPart(text="Describe the house."),)),), [])
