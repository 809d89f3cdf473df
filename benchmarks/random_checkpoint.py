"""Makes a random-weight LLaVA-NeXT checkpoint for speed measurements: in the hub's format, and imported into ours.

    python -m benchmarks.random_checkpoint FOLDER --size 50m

FOLDER/hub is what Hugging Face and vLLM read, FOLDER/focusllava what this program reads: the same weights. Random
weights choose nothing sensible, so the vision-guided sampler is set to keep the paper's 49 % (`keep_ratio.py`); the
text-guided one takes its 75 % from the request's `keep_ratio`. Speed depends on the number of tokens only.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.auto import CONFIG_MAPPING
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from benchmarks.keep_ratio import set_vision_keep_ratio
from services.checkpoint.config import VisionSamplerConfig
from services.checkpoint.import_llava_next import import_llava_next

ROOT = pathlib.Path(__file__).resolve().parent.parent
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ ' ' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """Widths and depths of a checkpoint; tiles are always CLIP ViT-L/14's 336 px of 24 x 24 patches."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vision_hidden: int
    vision_layers: int
    vocabulary: int = 4736


SIZES = {
    # To try a benchmark out; its figures mean nothing.
    "tiny": Size(hidden=64, layers=4, heads=2, kv_heads=1, intermediate=128, vision_hidden=64, vision_layers=2),
    "50m": Size(hidden=512, layers=12, heads=8, kv_heads=4, intermediate=1408, vision_hidden=384, vision_layers=6),
    "300m": Size(hidden=1024, layers=20, heads=16, kv_heads=8, intermediate=2816, vision_hidden=768, vision_layers=6),
    # Llama-3-8B and CLIP ViT-L/14, the paper's.
    "8b": Size(hidden=4096, layers=32, heads=32, kv_heads=8, intermediate=14336, vision_hidden=1024, vision_layers=24,
               vocabulary=128_320),
}  # fmt: skip


def make_tokenizer(size: Size) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned from this repository's documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(size.vocabulary, 4736),
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in sorted((ROOT / "docs").glob("*.md"))], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=CHAT_TEMPLATE,
    )


def make_hub(folder: pathlib.Path, size: Size, family: str = "llama", device: str = "cpu") -> float:
    """Writes the checkpoint as the hub's llava-hf/* repositories name its tensors; returns millions of parameters.

    device: where the weights are drawn, which on a GPU takes seconds instead of minutes.
    """
    tokenizer = make_tokenizer(size)
    family_config: Any = CONFIG_MAPPING[family]
    text = family_config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({"sliding_window": None} if family == "mistral" else {}),
    )
    vision = CLIPVisionConfig(
        hidden_size=size.vision_hidden,
        intermediate_size=4 * size.vision_hidden,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_hidden // 64,
        image_size=336,
        patch_size=14,
        projection_dim=size.vision_hidden,
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL.index("<image>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
    )
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # 8b: never a float32 copy
    try:
        with torch.device(device):
            model = LlavaNextForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(previous)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder, max_shard_size="2GB")  # the vision tower's shards are written again
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, image_grid_pinpoints=PINPOINTS
    )
    LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _rename_vision_tower(folder)
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def _rename_vision_tower(folder: pathlib.Path) -> None:
    """transformers 5 saves `vision_tower.x`; the hub's checkpoints, and what reads them, say `vision_model` between."""

    def renamed(name: str) -> str:
        old = "vision_tower."
        return name if f"{old}vision_model." in name else name.replace(old, f"{old}vision_model.", 1)

    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if all(renamed(name) == name for name in file.keys()):  # noqa: SIM118 (not a dict)
                continue
        save_file({renamed(name): tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text("utf8"))
        content["weight_map"] = {renamed(name): shard for name, shard in content["weight_map"].items()}
        index.write_text(json.dumps(content, indent=2) + "\n", "utf8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--size", choices=SIZES, default="50m")
    parser.add_argument("--family", choices=("llama", "mistral", "qwen2"), default="llama")
    parser.add_argument(
        "--vision-keep", type=float, default=0.49, help="share of visual tokens kept, base tile counted"
    )
    parser.add_argument("--device", default="cpu", help='where the weights are drawn; "cuda" for a large size')
    options = parser.parse_args()
    hub, ours = options.folder / "hub", options.folder / "focusllava"
    millions = make_hub(hub, SIZES[options.size], options.family, options.device)
    import_llava_next(hub, ours, vision_sampler=VisionSamplerConfig(similarity="normalized"))
    kept = set_vision_keep_ratio(ours, options.vision_keep, options.device)
    print(f"{options.folder}: {millions:.1f} M parameters; the vision-guided sampler keeps {kept:.1%} of 672 x 672")


if __name__ == "__main__":
    main()
