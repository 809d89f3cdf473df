"""What a checkpoint needs of a device: the arithmetic against what is really allocated, and for models of 7 and 8 B."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from focusllava.sizes import parse_size, size_text
from services.checkpoint.config import FocusLlavaConfig, TextSamplerConfig, VisionSamplerConfig
from services.checkpoint.import_llava_next import expected_shapes
from services.checkpoint.sizing import block_bytes, full_image, size_encoder, size_llm
from services.checkpoint.store import stage_elements
from services.checkpoint.supported import largest_image
from services.common.errors import InvalidInput
from services.encoder.pipeline import EncoderPipeline
from services.llm.engine import Engine
from tests import tiny_llm
from tests.tiny_checkpoints import FAMILIES, make_random_checkpoint
from tests.unit.encoder.test_pipeline import png

ROOT = pathlib.Path(__file__).parents[3]
GIB = 2**30
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
LLAMA3 = {"model_type": "llama", "vocab_size": 128_320, "hidden_size": 4096, "intermediate_size": 14_336,
          "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
          "max_position_embeddings": 8192}  # fmt: skip
VICUNA = {**LLAMA3, "vocab_size": 32_064, "intermediate_size": 11_008, "num_key_value_heads": 32,
          "max_position_embeddings": 4096}  # fmt: skip
MISTRAL = {**LLAMA3, "model_type": "mistral", "vocab_size": 32_064, "max_position_embeddings": 32_768,
           "sliding_window": None}  # fmt: skip
QWEN2 = {"model_type": "qwen2", "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944,
         "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
         "max_position_embeddings": 32_768}  # fmt: skip


def hub_config(text: dict[str, Any]) -> FocusLlavaConfig:
    """The config that `focusllava import` makes of llava-hf's checkpoints: CLIP ViT-L/14 at 336 px."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
              "image_size": 336, "patch_size": 14}  # fmt: skip
    return FocusLlavaConfig(
        vision=vision,
        text=text,
        image_token_id=4,
        image_grid_pinpoints=PINPOINTS,
        vision_sampler=VisionSamplerConfig(enabled=False),
        text_sampler=TextSamplerConfig(layer=8),
    )


def elements(config: FocusLlavaConfig, prefix: str) -> int:
    shapes = expected_shapes(config).items()
    return sum(
        torch.Size(shape).numel() for name, shape in shapes if name.startswith("language_model.") == bool(prefix)
    )


def sized(text: dict[str, Any], budget: int, **options: Any):
    config = hub_config(text)
    return size_llm(config, elements(config, "llm"), dtype=torch.bfloat16, budget=budget, where="here", **options)


@pytest.mark.parametrize(
    ("text", "billions", "a_token"),
    [(LLAMA3, 8.03, 128 + 8), (VICUNA, 6.74, 512 + 8), (MISTRAL, 7.24, 128 + 8), (QWEN2, 7.62, 56 + 7)],
    ids=["Llama-3-8B", "Vicuna-7B", "Mistral-7B", "Qwen2-7B"],
)
def test_models_of_the_hub_on_an_a100(text: dict[str, Any], billions: float, a_token: int) -> None:
    """Numbers of the published models; a token's KiB are keys and values of all layers and one hidden state."""
    config, budget = hub_config(text), int(0.9 * 80 * GIB)
    assert largest_image(config) == ((672, 672), 2928)
    assert elements(config, "llm") == pytest.approx(billions * 1e9, rel=2e-3)
    assert block_bytes(config, torch.bfloat16) == 16 * a_token * 2**10
    tokens, bytes_ = full_image(config, torch.bfloat16)
    assert tokens == 2928 + 128 + 256 and bytes_ == tokens * a_token * 2**10
    sizes = sized(text, budget, on_gpu=True)
    assert sizes.bytes == budget and sizes.kv_cache_bytes > 0.6 * budget
    assert sizes.full_images == min(sizes.max_running, sizes.kv_cache_bytes // bytes_) >= 25
    assert sizes.max_batch_tokens == 4096


def test_llama_3_8b_on_smaller_machines() -> None:
    laptop = sized(LLAMA3, int(0.9 * 24 * GIB), on_gpu=True)
    assert 6 <= laptop.full_images <= 12
    on_cpu = sized(LLAMA3, 20 * GIB, on_gpu=False)
    assert 1 <= on_cpu.full_images and on_cpu.bytes <= 20 * GIB and on_cpu.max_batch_tokens == 128
    with pytest.raises(InvalidInput) as refused:
        sized(LLAMA3, 12 * GIB, on_gpu=False)
    message = str(refused.value)
    assert message.startswith("memory: here has 12 GiB for the language model, 15 GiB are needed to answer")
    assert "one image of 672 x 672 px: 14 GiB of weights in bfloat16" in message and "its 3,312 tokens" in message
    # Where weights are converted, embeddings are in memory too, and the head for a moment twice.
    config = hub_config(LLAMA3)
    wide = size_llm(config, elements(config, "llm"), dtype=torch.float32, on_gpu=False, budget=40 * GIB)
    assert wide.weights == 4 * elements(config, "llm") and wide.activations > 4 * 128_320 * 4096


def test_what_is_needed_is_what_is_just_enough() -> None:
    """Less by a block is refused; with it one full image fits, and one request is in work."""
    config = hub_config(LLAMA3)
    count = elements(config, "llm")

    def with_budget(budget: int):
        return size_llm(config, count, dtype=torch.bfloat16, on_gpu=False, budget=budget)

    low, high = GIB, 40 * GIB
    while high - low > 1:
        middle = (low + high) // 2
        try:
            with_budget(middle)
            high = middle
        except InvalidInput:
            low = middle
    least = with_budget(high)
    assert (least.full_images, least.max_running) == (1, 1) and least.kv_cache_bytes == least.full_image_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_bytes": 128 * 2**20}, "kv_cache_bytes: is 128 MiB, expected 440 MiB (461242368 bytes) or more"),
        ({"max_model_len": 1000}, "max_model_len: is 1000, expected 3056 or more: an image of 672 x 672 px alone is"),
        ({"max_model_len": 10_000}, "max_model_len: is 10000, expected 8192 or less"),
    ],
)
def test_sizes_that_can_never_answer_are_refused_by_name(options: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        sized(LLAMA3, 80 * GIB, on_gpu=True, **options)
    assert message in str(refused.value)


def test_given_sizes_are_taken_as_they_are() -> None:
    given = {"kv_cache_bytes": GIB, "max_batch_tokens": 333, "max_running": 7}
    sizes = sized(LLAMA3, 80 * GIB, on_gpu=True, **given)
    assert (sizes.kv_cache_bytes, sizes.max_batch_tokens, sizes.max_running, sizes.full_images) == (GIB, 333, 7, 2)
    shorter = sized(LLAMA3, 80 * GIB, on_gpu=True, max_model_len=3100)
    assert shorter.full_image_tokens == 3100


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_is_what_the_engine_allocates(family: str) -> None:
    folder = tiny_llm.checkpoint(family)
    config = FocusLlavaConfig.load(folder)
    for dtype in (torch.float32, torch.bfloat16):
        _, request = full_image(config, dtype)
        cache = Engine.from_checkpoint(folder, dtype=dtype, kv_cache_bytes=3 * request).cache
        assert cache.block_bytes == block_bytes(config, dtype)
        tensors = (cache.key, cache.value, cache.hidden)
        assert 3 * request <= sum(tensor.nbytes for tensor in tensors) + cache.page_bytes <= 3 * request + 3 * 2**14


def test_the_largest_image_is_the_one_that_the_encoder_makes_most_of(tmp_path: pathlib.Path) -> None:
    make_random_checkpoint(tmp_path / "checkpoint")
    pipeline = EncoderPipeline.from_checkpoint(tmp_path / "checkpoint")
    (height, width), most = largest_image(pipeline.config)
    made = {}
    for size_hw in {*pipeline.config.image_grid_pinpoints, (60, 100), (100, 60), (500, 499), (29, 90)}:
        image = pipeline.prepare(png(size_hw[1], size_hw[0]))
        made[size_hw] = len(pipeline.encode([image], [False])[0].tokens_ND)
    assert max(made.values()) == made[height, width] == most


@pytest.mark.parametrize("text", ["4GiB", "4 GiB", "4G", "4096M", "4294967296"])
def test_sizes_are_read_as_vllm_reads_them(text: str) -> None:
    assert parse_size(text) == 4 * GIB and size_text(4 * GIB) == "4.0 GiB"


def test_decimal_and_other_sizes() -> None:
    assert (parse_size("25.6k"), parse_size("8K"), parse_size("2.5GB")) == (25_600, 8192, 2_500_000_000)
    for text in ("", "x", "-1", "2.5", "4iB", "1e9", "4 G B"):
        with pytest.raises(ValueError, match="is no size"):
            parse_size(text)


_MEASURED = """
import pathlib, re, sys
import torch
from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.sizing import full_image, size_llm
from services.checkpoint.store import stage_elements
from services.checkpoint.supported import largest_image
from services.compute.malloc import keep_freed_memory
from services.common.types import *
from services.llm.engine import Engine
small, folder, dtype = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), getattr(torch, sys.argv[3])
keep_freed_memory()
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
def answer(engine, visual):
    width = engine.decoder.config.hidden_size
    tokens = CompressedVisualTokens(tokens_ND=torch.randn(visual, width), map_hw=(1, 1), content_hash="0" * 64,
        branch_ids_M=torch.empty(0, dtype=torch.uint8), uncompressed_tokens=visual,
        model_fingerprint=engine.fingerprint)
    turn = PromptTurn(role="user", parts=(ImagePart(image=0), TextPart(text="What number is on the red card?")))
    engine.submit(GenerateRequest(request_id="r", turns=(turn,), images=(tokens,),
        samplers=SamplerSettings(threshold=1.0), sampling=SamplingParams(max_tokens=4, ignore_eos=True)))
    while engine.has_work():
        engine.step()
answer(Engine.from_checkpoint(small, dtype=dtype, kv_cache_bytes=2**22), 80)  # everything is imported and warm now
before = anonymous()
config = FocusLlavaConfig.load(folder)
sizes = size_llm(config, stage_elements(folder, "llm"), dtype=dtype, on_gpu=False, budget=4 * 2**30)
engine = Engine.from_checkpoint(folder, dtype=dtype, kv_cache_bytes=sizes.full_image_bytes,
    max_batch_tokens=sizes.max_batch_tokens, max_running=1)
loaded = anonymous() - before
answer(engine, largest_image(config)[1])
print(loaded, anonymous() - before, sizes.weights, sizes.full_image_bytes, sizes.activations)
"""


def test_memory_is_what_was_worked_out(tmp_path: pathlib.Path) -> None:
    """A decoder of Llama's shape, loaded and asked about a full image by a process of its own."""
    make_random_checkpoint(tmp_path / "small")
    make_random_checkpoint(
        tmp_path / "large", hidden=768, layers=4, heads=12, kv_heads=4, tile_px=112, dtype="float32",
        max_shard_bytes=2**26,
    )  # fmt: skip
    command = [sys.executable, "-c", _MEASURED, str(tmp_path / "small"), str(tmp_path / "large"), "float32"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded, ran, weights, cache, activations = map(int, result.stdout.split())
    assert 0.7 * weights + cache < loaded < 1.3 * weights + cache + 32 * 2**20, (loaded, weights, cache)
    assert ran < 1.1 * weights + cache + activations, (ran, weights, cache, activations)


def test_an_encoders_weights_are_counted(tmp_path: pathlib.Path) -> None:
    make_random_checkpoint(tmp_path / "checkpoint")
    pipeline = EncoderPipeline.from_checkpoint(tmp_path / "checkpoint")
    stored = stage_elements(tmp_path / "checkpoint", "encoder")
    with torch.device("meta"):
        own = type(pipeline.model)(pipeline.config)
    assert stored == sum(parameter.numel() for parameter in own.parameters())
    sizes = size_encoder(pipeline.config, stored, dtype=torch.bfloat16, on_gpu=False, max_tiles=3)
    assert sizes.weights == 2 * stored and sizes.max_tiles == 3


def test_the_operations_page_has_what_the_arithmetic_gives() -> None:
    config = hub_config(LLAMA3)
    page = (ROOT / "docs" / "operations.md").read_text()
    rows = re.findall(r"^\| (\d+) GiB \| (\S+ GiB) \| (\S+ GiB) \| (\d+) \| (\d+) \|$", page, re.M)
    assert len(rows) == 5
    for gpu, *row in rows:
        sizes = size_llm(
            config, elements(config, "llm"), dtype=torch.bfloat16, on_gpu=True, budget=int(0.9 * int(gpu) * GIB)
        )
        found = [size_text(sizes.weights), size_text(sizes.kv_cache_bytes), sizes.max_running, sizes.full_images]
        assert row == list(map(str, found)), gpu
