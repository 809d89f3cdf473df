"""Very small random checkpoints for tests: in our own format, and LLaVA-NeXT ones in the hub's."""

from __future__ import annotations

import functools
import json
import math
import pathlib
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.models.auto import CONFIG_MAPPING

from services.checkpoint.config import FocusLlavaConfig, TextSamplerConfig, VisionSamplerConfig
from services.checkpoint.store import LLM_PREFIX
from services.checkpoint.writer import save_checkpoint
from services.encoder.model import EncoderModel

FAMILIES = ("llama", "mistral", "qwen2")
IMAGE_TOKEN = "<image>"
BOS = {"llama": "<|begin_of_text|>", "mistral": "<s>", "qwen2": None}
EOS = {"llama": "<|eot_id|>", "mistral": "</s>", "qwen2": "<|im_end|>"}
MARKERS = {
    "llama": ["<|start_header_id|>", "<|end_header_id|>"],
    "mistral": ["[INST]", "[/INST]"],
    "qwen2": ["<|im_start|>"],
}

_CONTENT = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
)
CHAT_TEMPLATES = {
    "llama": "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}" + _CONTENT + "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    # No BOS here: as on the hub, the tokenizer adds it.
    "mistral": "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' }}" + _CONTENT + "{{ '</s> ' }}"
    "{% elif m['role'] == 'system' %}{{ '<<SYS>>\n' }}" + _CONTENT + "{{ '\n<</SYS>>\n\n' }}"
    "{% else %}{{ '[INST] ' }}" + _CONTENT + "{{ ' [/INST]' }}{% endif %}{% endfor %}",
    "qwen2": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}" + _CONTENT + "{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}
_CORPUS = (
    "What number is on the red card? The number on the red card is seven.",
    "Which word is written above the blue circle? The word is house. Describe the image in one sentence.",
    "How many green squares are there? There are three green squares and one yellow triangle in the image.",
    "You are a helpful assistant that answers questions about images, briefly and truthfully.",
)


@functools.cache
def _tokenizer_json(family: str) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", *filter(None, [BOS[family]]), EOS[family], *MARKERS[family], IMAGE_TOKEN]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    if BOS[family]:
        from tokenizers.processors import TemplateProcessing

        bos_id = tokenizer.token_to_id(BOS[family])
        tokenizer.post_processor = TemplateProcessing(
            single=f"{BOS[family]} $A", pair=f"{BOS[family]} $A $B", special_tokens=[(BOS[family], bos_id)]
        )
    return tokenizer.to_str()


def make_tokenizer(family: str = "llama") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 400 tokens with the family's markers and chat template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json(family)),
        bos_token=BOS[family],
        eos_token=EOS[family],
        pad_token="<pad>",
        additional_special_tokens=MARKERS[family],
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )
    tokenizer.chat_template = CHAT_TEMPLATES[family]
    return tokenizer


def text_fields(family: str, *, hidden: int, layers: int, heads: int, kv_heads: int, context: int) -> dict[str, Any]:
    tokenizer = make_tokenizer(family)
    return {
        "model_type": family,
        # Padded to a multiple of 64, as on the hub.
        "vocab_size": math.ceil(len(tokenizer) / 64) * 64,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        # Wide enough that logits differ clearly: greedy choices of a random model are then no near-ties.
        "initializer_range": 0.15,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0 if family == "llama" else 10000.0},
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **({"sliding_window": None} if family == "mistral" else {}),
    }


def vision_fields(*, width: int, layers: int, tile_px: int, patch_px: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "image_size": tile_px,
        "patch_size": patch_px,
        "projection_dim": width,
    }


def grid_pinpoints(tile_px: int) -> tuple[tuple[int, int], ...]:
    """LLaVA-NeXT's grids (1x2, 2x1, 2x2, 3x1, 1x3) for tiles of this size, as (height, width) in pixels."""
    return tuple((rows * tile_px, cols * tile_px) for rows, cols in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)))


def _randomise_vectors(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Norms and biases start at one and zero, where a mix-up would not show."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def make_random_checkpoint(
    folder: str | pathlib.Path,
    family: str = "llama",
    *,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 6,
    heads: int = 4,
    kv_heads: int = 2,
    context: int = 2048,
    vision_width: int = 32,
    vision_layers: int = 3,
    tile_px: int = 28,
    patch_px: int = 7,
    vision_sampler: VisionSamplerConfig | None = None,
    text_sampler: TextSamplerConfig | None = None,
    tied: bool = False,
    dtype: str = "float32",
    max_shard_bytes: int = 100_000,
) -> str:
    """Writes a random checkpoint in our format, several shards a stage, and returns its fingerprint.

    Defaults: 6 decoder layers of width 64, tiles of 28 px with 4 x 4 patches, both samplers on.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(family)
    text = text_fields(family, hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, context=context)
    side = tile_px // patch_px
    config = FocusLlavaConfig(
        vision=vision_fields(width=vision_width, layers=vision_layers, tile_px=tile_px, patch_px=patch_px),
        text={**text, "tie_word_embeddings": tied},
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_grid_pinpoints=grid_pinpoints(tile_px),
        eos_token_ids=(tokenizer.eos_token_id,),
        vision_sampler=vision_sampler or VisionSamplerConfig(base_grid=(side, side), similarity="normalized"),
        text_sampler=text_sampler or TextSamplerConfig(layer=max(1, layers // 3)),
        dtype=dtype,  # type: ignore[arg-type]
    )
    encoder, llm = EncoderModel(config), AutoModelForCausalLM.from_config(config.text_config)
    generator = torch.Generator().manual_seed(seed)
    for module in (encoder, llm):
        _randomise_vectors(module, generator)
        module.to(getattr(torch, dtype))
    # A trained selector tells regions apart; a fresh one keeps full resolution, and tests want all branches.
    with torch.no_grad():
        encoder.vision_guided_sampler.selector.linear.weight.normal_(std=2, generator=generator)
        encoder.vision_guided_sampler.selector.linear.bias.zero_()
    return save_checkpoint(
        folder,
        config,
        encoder.state_dict(),
        {LLM_PREFIX + name: tensor for name, tensor in llm.state_dict().items()},
        tokenizer,
        max_shard_bytes=max_shard_bytes,
    )


def make_hub_checkpoint(
    folder: str | pathlib.Path,
    family: str = "llama",
    *,
    seed: int = 0,
    hidden: int = 64,
    intermediate: int | None = None,
    layers: int = 6,
    heads: int = 4,
    kv_heads: int = 2,
    context: int = 2048,
    vision_width: int = 32,
    vision_layers: int = 3,
    tile_px: int = 28,
    patch_px: int = 7,
    dtype: str = "float32",
    layout: str = "hub",
    chat_template_in: str = "chat_template.json",
    max_shard_bytes: int = 200_000,
    **config_fields: Any,
) -> pathlib.Path:
    """Writes a random LLaVA-NeXT checkpoint with the files and tensor names of llava-hf/*, in several shards.

    layout "hub" names tensors as those repositories do, "new" as transformers 4.52 and later save them.
    chat_template_in: the file that holds the template. config_fields override LlavaNextConfig's.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(family)
    text = text_fields(family, hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, context=context)
    text["intermediate_size"] = intermediate or text["intermediate_size"]
    vision = vision_fields(width=vision_width, layers=vision_layers, tile_px=tile_px, patch_px=patch_px)
    fields: dict[str, Any] = {
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        "image_grid_pinpoints": [list(p) for p in grid_pinpoints(tile_px)],
        "vision_feature_layer": -2,
        "vision_config": CLIPVisionConfig(**vision),
        "text_config": CONFIG_MAPPING[family](**{k: v for k, v in text.items() if k != "model_type"}),
        **config_fields,
    }
    model = LlavaNextForConditionalGeneration(LlavaNextConfig(**fields))
    _randomise_vectors(model, torch.Generator().manual_seed(seed))
    model.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    model.config.save_pretrained(folder)
    _save_shards(folder, {_hub_name(name, layout): t for name, t in model.state_dict().items()}, max_shard_bytes)

    if chat_template_in != "tokenizer_config.json":
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    if chat_template_in == "chat_template.jinja":
        (folder / chat_template_in).write_text(CHAT_TEMPLATES[family], "utf8")
    elif chat_template_in == "chat_template.json":
        _write_json(folder / chat_template_in, {"chat_template": CHAT_TEMPLATES[family]})
    else:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        saved = json.loads((folder / chat_template_in).read_text("utf8"))
        _write_json(folder / chat_template_in, {**saved, "chat_template": CHAT_TEMPLATES[family]})
    _write_json(
        folder / "generation_config.json",
        {"eos_token_id": [tokenizer.eos_token_id], "pad_token_id": tokenizer.pad_token_id},
    )
    _write_json(
        folder / "preprocessor_config.json",
        {
            "aspect_ratio_setting": "anyres",
            "crop_size": {"height": tile_px, "width": tile_px},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_grid_pinpoints": fields["image_grid_pinpoints"],
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_processor_type": "LlavaNextImageProcessor",
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"shortest_edge": tile_px},
        },
    )
    _write_json(
        folder / "processor_config.json",
        {
            "image_token": IMAGE_TOKEN,
            "num_additional_image_tokens": 1,
            "patch_size": patch_px,
            "processor_class": "LlavaNextProcessor",
            "vision_feature_select_strategy": "default",
        },
    )
    return folder


def _hub_name(name: str, layout: str) -> str:
    """transformers' name in memory -> the name on disk."""
    if layout == "new":
        return name.replace("model.vision_tower.", "model.vision_tower.vision_model.", 1)
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    name = name.removeprefix("model.").replace("language_model.", "language_model.model.", 1)
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


def _save_shards(folder: pathlib.Path, tensors: dict[str, torch.Tensor], max_bytes: int) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in sorted(tensors.items()):
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > max_bytes:
            shards.append({})
        shards[-1][name] = tensor
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        total = sum(t.nbytes for t in tensors.values())
        _write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf8")
