"""Makes a checkpoint of a plain language model and a plain CLIP: what training's first stage starts from.

    meta-llama/Meta-Llama-3-8B-Instruct + openai/clip-vit-large-patch14-336 -> encoder, projector, language model

The projector, the newline and the vision-guided sampler are new (random); `training/pretrain.py` teaches them.
"""

from __future__ import annotations

import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from transformers import AutoTokenizer, CLIPVisionConfig, PreTrainedTokenizerBase
from transformers.models.auto import CONFIG_MAPPING

from services.checkpoint.config import TEXT_FAMILIES, FocusLlavaConfig, TextSamplerConfig, VisionSamplerConfig
from services.checkpoint.hub_config import LIBRARY_FIELDS, chat_template, declared_ends, read_json
from services.checkpoint.hub_tensors import DTYPES, HubTensor, map_names
from services.checkpoint.import_llava_next import SAMPLER, ImportReport, expected_shapes
from services.checkpoint.store import EMBEDDINGS, LLM_PREFIX, LM_HEAD, check_shapes
from services.checkpoint.supported import check_servable
from services.checkpoint.writer import CheckpointWriter
from services.common.errors import InvalidInput
from services.sampler.vision_guided import VisionGuidedSampler

IMAGE_TOKEN = "<image>"
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""LLaVA-NeXT's grids of tiles, (rows, columns)."""
VOCABULARY_MULTIPLE = 64
"""A vocabulary that the image token makes longer is padded to a multiple of this, as the hub's LLaVA models are."""
TEMPLATE_HEAD = r"""{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- else -%}
{%- set joined = namespace(text='') -%}
{%- for part in message['content'] -%}
{%- set joined.text = joined.text + ('<image>\n' if part['type'] == 'image' else part['text']) -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': joined.text}] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
"""What is put before a text model's chat template, which knows turns of words alone: each turn's parts become words."""


def assemble(
    text: str | pathlib.Path,
    vision: str | pathlib.Path,
    dst: str | pathlib.Path,
    *,
    template: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    dry_run: Callable[[pathlib.Path], str] | None = None,
) -> ImportReport:
    """Writes the checkpoint at `dst`.

    text: a hub folder of a Llama, Mistral or Qwen2 with its fast tokenizer; vision: one of CLIP, whole or its vision
    model alone. template: the chat template, default the text model's, taught to read images. seed: draws what is new.
    progress: called with bytes done and bytes in all; dry_run: as `import_llava_next`'s.
    Raises InvalidInput naming what is missing or not supported.
    """
    started = time.monotonic()
    text, vision = pathlib.Path(text), pathlib.Path(vision)
    decoder, tower = _text_config(text), _vision_config(vision)
    tokenizer = _tokenizer(text)
    tokenizer.chat_template = _image_template(tokenizer, template or chat_template(text))
    sources = {**_vision_tensors(vision), **map_names(text, _text_name)[0]}
    if odd := sorted({s.dtype for s in sources.values()} - set(DTYPES)):
        raise InvalidInput(f"has tensors of {', '.join(odd)}: quantized weights are not supported", field="source")
    config = _config(text, vision, decoder, tower, tokenizer, sources)
    fresh = _fresh(config, seed)
    expected = expected_shapes(config)
    if config.text_config.tie_word_embeddings:
        del expected[LM_HEAD]
        sources.pop(LM_HEAD, None)
    shapes = {name: _grown(name, source.shape, config) for name, source in sources.items()}
    check_shapes(shapes, {name: shape for name, shape in expected.items() if name not in fresh})
    total, done = sum(math.prod(shape) for shape in shapes.values()), 0
    with CheckpointWriter(dst, config) as writer:
        for name, source in sorted(sources.items(), key=lambda item: item[0].startswith(LLM_PREFIX)):
            with safe_open(source.path, framework="pt", device="cpu") as file:
                tensor = file.get_tensor(source.hub_name)
            writer.add(name, _lengthened(tensor, shapes[name][0]) if tensor.ndim else tensor)
            done += math.prod(shapes[name])
            del tensor
            if progress:
                progress(done, total)
        for name, tensor in fresh.items():
            writer.add(name, tensor)
        made_of = f"{text.resolve().name} and {vision.resolve().name}"
        tried: list[str] = []
        result = writer.finish(
            tokenizer,
            readme=f"# {writer.folder.name}\n\nA FocusLLaVA checkpoint that `focusllava assemble` made of {made_of}, "
            "whose licences are theirs. Its projector is untrained.\n",
            check=(lambda folder: tried.append(dry_run(folder))) if dry_run else None,
        )
    return ImportReport(
        tensors_used=len(sources),
        tensors_unused=(),
        bytes=writer.bytes_written,
        seconds=time.monotonic() - started,
        fingerprint=result,
        notes=("projector, newline and vision-guided sampler are new: training/pretrain.py comes first", *tried),
    )


def _tokenizer(text: pathlib.Path) -> PreTrainedTokenizerBase:
    """The text model's, which knows the image token from now on."""
    if not (text / "tokenizer.json").is_file():
        raise InvalidInput(f"{text} has no tokenizer.json: save it with a fast tokenizer first", field="text")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(text), local_files_only=True)
    except Exception as error:  # of any kind: tokenizers raises the bare class
        raise InvalidInput(f"cannot be read: {type(error).__name__}: {error}", field="text tokenizer.json") from None
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    return tokenizer


def _image_template(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """The template itself where it writes an image down, else with the head that lets it."""
    mark = "what is this"
    turns: Any = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": mark}]}]
    problem = ""
    for candidate in (template, TEMPLATE_HEAD + template):
        try:
            said = tokenizer.apply_chat_template(
                turns, chat_template=candidate, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # of any kind: it is the template's own code
            problem = f": {type(error).__name__}: {error}"
            continue
        if str(said).count(IMAGE_TOKEN) == 1 and mark in said and "'type'" not in said:
            return candidate
    raise InvalidInput(f"does not write an image and its question down{problem}", field="chat_template")


def _text_config(text: pathlib.Path) -> Any:
    raw = read_json(text / "config.json")
    family = raw.get("model_type")
    if family not in TEXT_FAMILIES:
        raise InvalidInput(f"is {family!r}, supported: {', '.join(TEXT_FAMILIES)}", field="text config.json model_type")
    if raw.get("quantization_config") is not None:
        raise InvalidInput("is not supported", field="text config.json quantization_config")
    return _read(lambda: CONFIG_MAPPING[family].from_dict(raw), "text config.json")


def _vision_config(vision: pathlib.Path) -> Any:
    raw = read_json(vision / "config.json")
    if raw.get("model_type") not in ("clip", "clip_vision_model"):
        wrong = f"is {raw.get('model_type')!r}, supported: clip, clip_vision_model"
        raise InvalidInput(wrong, field="vision config.json model_type")
    return _read(lambda: CLIPVisionConfig.from_dict(raw.get("vision_config", raw)), "vision config.json")


def _read(build: Callable[[], Any], field: str) -> Any:
    try:
        return build()
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidInput(f"cannot be read: {error}", field=field) from None


def _config(
    text: pathlib.Path, vision: pathlib.Path, decoder: Any, tower: Any, tokenizer: Any, sources: dict[str, HubTensor]
) -> FocusLlavaConfig:
    fields, vision_fields = (
        {name: value for name, value in part.to_diff_dict().items() if name not in LIBRARY_FIELDS}
        for part in (decoder, tower)
    )
    vision_fields = {name: value for name, value in vision_fields.items() if name not in ("model_type", "vocab_size")}
    words = max(decoder.vocab_size, len(tokenizer))
    if words > decoder.vocab_size:
        words = math.ceil(words / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    tied = decoder.tie_word_embeddings and LM_HEAD not in sources
    side, layers = tower.image_size // tower.patch_size, decoder.num_hidden_layers
    pixels = read_json(vision / "preprocessor_config.json")
    for name in ("image_mean", "image_std"):
        if not isinstance(pixels.get(name), list):
            raise InvalidInput(f"is {pixels.get(name)!r}", field=f"vision preprocessor_config.json {name}")
    config = FocusLlavaConfig(
        vision={**vision_fields, "image_size": tower.image_size, "patch_size": tower.patch_size},
        text={**fields, "model_type": decoder.model_type, "vocab_size": words, "tie_word_embeddings": tied},
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_grid_pinpoints=tuple((rows * tower.image_size, cols * tower.image_size) for rows, cols in GRIDS),
        image_mean=tuple(pixels["image_mean"]),  # type: ignore[arg-type]
        image_std=tuple(pixels["image_std"]),  # type: ignore[arg-type]
        eos_token_ids=declared_ends(text, decoder.eos_token_id, tokenizer, "text config.json eos_token_id"),
        vision_sampler=VisionSamplerConfig(enabled=False, base_grid=(side, side)),
        text_sampler=TextSamplerConfig(layer=min(max(1, round(layers / 4)), layers - 1)),
        dtype=DTYPES[max(sources.values(), key=lambda s: math.prod(s.shape)).dtype],  # type: ignore[arg-type]
    )
    check_servable(config)
    return config


def _text_name(name: str) -> str:
    return LM_HEAD if name == "lm_head.weight" else LLM_PREFIX + name


def _vision_tensors(vision: pathlib.Path) -> dict[str, HubTensor]:
    """The vision model's, of a whole CLIP or by itself; the latter's may have no prefix."""
    found, prefix = map_names(vision, lambda name: name)[0], "vision_model."
    whole = any(name.startswith(prefix) for name in found)
    return {
        f"vision_tower.{name.removeprefix(prefix)}": tensor
        for name, tensor in found.items()
        if name.startswith(prefix) or not whole
    }


def _fresh(config: FocusLlavaConfig, seed: int) -> dict[str, torch.Tensor]:
    """What no source has: projector, newline and vision-guided sampler, drawn with `seed`."""
    generator = torch.Generator().manual_seed(seed)
    width, seen = config.text_config.hidden_size, config.vision_config.hidden_size
    new = {"image_newline": torch.randn(width, generator=generator) / width**0.5}
    for name, inputs in (("linear_1", seen), ("linear_2", width)):
        bound = inputs**-0.5
        for part, shape in (("weight", (width, inputs)), ("bias", (width,))):
            drawn = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            new[f"multi_modal_projector.{name}.{part}"] = drawn
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sampler = VisionGuidedSampler(width, config.patches_per_side**2, **config.vision_sampler.module_options())
    new |= {SAMPLER + name: tensor for name, tensor in sampler.state_dict().items()}
    return {name: tensor.to(getattr(torch, config.dtype)) for name, tensor in new.items()}


def _grown(name: str, shape: tuple[int, ...], config: FocusLlavaConfig) -> tuple[int, ...]:
    """The tensor's shape in the new checkpoint: rows of words are as many as its vocabulary has."""
    if name in (EMBEDDINGS, LM_HEAD) and shape[0] < (words := config.text_config.vocab_size):
        return (words, *shape[1:])
    return shape


def _lengthened(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """The tensor with so many rows; new ones are the mean of all."""
    if len(tensor) == rows:
        return tensor
    mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
    return torch.cat((tensor, mean.expand(rows - len(tensor), -1)))
