"""Renderers of prompts on random checkpoints, and turns for them."""

from __future__ import annotations

from typing import Any

from services.common.types import ImagePart, PromptTurn, TextPart
from services.text.prompt import Prompt, PromptRenderer
from tests.tiny_checkpoints import IMAGE_TOKEN, make_tokenizer

# The template of llava-v1.6-vicuna: every image of a turn first.
VICUNA = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def turn(role: str, *parts: str | int) -> PromptTurn:
    made = tuple(ImagePart(image=p) if isinstance(p, int) else TextPart(text=p) for p in parts)
    return PromptTurn(role=role, parts=made)


def renderer(family: str = "llama", *, template: str | None = None, **options: Any) -> PromptRenderer:
    tokenizer = make_tokenizer(family)
    if template:
        tokenizer.chat_template = template
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return PromptRenderer(tokenizer, **{"image_token_id": image_token_id, "context": 2048, **options})


def words(target: PromptRenderer, prompt: Prompt) -> str:
    return target.tokenizer.decode([prompt.input_ids[p] for p in prompt.instruction_positions])
