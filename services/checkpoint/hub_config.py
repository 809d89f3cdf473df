"""The small files of a LLaVA-NeXT checkpoint of the hub, read into our config."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, LlavaNextConfig

from services.checkpoint.config import TEXT_FAMILIES, FocusLlavaConfig, TextSamplerConfig, VisionSamplerConfig
from services.common.errors import InvalidInput

PREPROCESSING = {
    "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
    "resample": 3, "rescale_factor": 1 / 255,
}  # fmt: skip
_LIBRARY_FIELDS = ("transformers_version", "architectures", "dtype", "use_cache", "_name_or_path")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf8"))
    except FileNotFoundError:
        raise InvalidInput(f"{path.parent} has no {path.name}", field="source") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} is not JSON: {error}", field="source") from None


def read_hub_config(src: pathlib.Path) -> Any:
    """The hub's LlavaNextConfig, once it is sure that this program computes what it describes."""
    raw = read_json(src / "config.json")
    if raw.get("model_type") != "llava_next":
        raise InvalidInput(f"is {raw.get('model_type')!r}, expected 'llava_next'", field="config.json model_type")
    try:
        hub: Any = LlavaNextConfig.from_dict(raw)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise InvalidInput(f"is not a LLaVA-NeXT config: {error}", field="config.json") from None
    text, vision = hub.text_config, hub.vision_config
    supported: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "text_config.model_type": (text.model_type, TEXT_FAMILIES),
        "vision_config.model_type": (vision.model_type, ("clip_vision_model",)),
        "vision_feature_select_strategy": (hub.vision_feature_select_strategy, ("default",)),
        "projector_hidden_act": (hub.projector_hidden_act, ("gelu",)),
        "quantization_config": (raw.get("quantization_config"), (None,)),
    }
    for field, (value, allowed) in supported.items():
        if value not in allowed:
            raise InvalidInput(f"is {value!r}, supported: {', '.join(map(str, allowed))}", field=f"config.json {field}")
    if not isinstance(hub.vision_feature_layer, int):
        found = f"is {hub.vision_feature_layer}, only a single layer is supported"
        raise InvalidInput(found, field="config.json vision_feature_layer")
    window = text.sliding_window if getattr(text, "use_sliding_window", True) and text.model_type != "llama" else None
    if window is not None and window < text.max_position_embeddings:
        raise InvalidInput(
            f"is {window}, smaller than the context of {text.max_position_embeddings}: windowed attention is not "
            f"supported; set it to null, or max_position_embeddings to {window}",
            field="config.json text_config.sliding_window",
        )
    return hub


def _preprocessing(src: pathlib.Path, hub: Any) -> dict[str, Any]:
    """The image processor's settings; refuses what our tiling does not do."""
    path = src / "preprocessor_config.json"
    raw = read_json(path) if path.is_file() else read_json(src / "processor_config.json").get("image_processor", {})
    for name, value in PREPROCESSING.items():
        if abs(raw.get(name, value) - value) > 1e-9:
            raise InvalidInput(f"is {raw[name]!r}, supported: {value!r}", field=f"{path.name} {name}")
    tile = hub.vision_config.image_size
    sizes = {*raw.get("size", {}).values(), *raw.get("crop_size", {}).values()}
    if sizes - {tile}:
        raise InvalidInput(f"has {sorted(sizes)}, the vision tower takes {tile} px", field=f"{path.name} size")
    pinpoints = raw.get("image_grid_pinpoints", hub.image_grid_pinpoints)
    if sorted(map(tuple, pinpoints)) != sorted(map(tuple, hub.image_grid_pinpoints)):
        raise InvalidInput("differs from config.json's", field=f"{path.name} image_grid_pinpoints")
    if not {"image_mean", "image_std"} <= raw.keys():
        raise InvalidInput("lacks image_mean or image_std", field=path.name)
    return raw


def convert_config(
    src: pathlib.Path,
    hub: Any,
    vision_sampler: VisionSamplerConfig | None,
    text_layer: int | None,
    text_threshold: float,
    stored_dtype: str,
) -> FocusLlavaConfig:
    preprocessing = _preprocessing(src, hub)
    text, vision = (
        {name: value for name, value in part.to_diff_dict().items() if name not in _LIBRARY_FIELDS}
        for part in (hub.text_config, hub.vision_config)
    )
    text["tie_word_embeddings"] = bool(hub.tie_word_embeddings or hub.text_config.tie_word_embeddings)
    for name in ("model_type", "vocab_size"):
        vision.pop(name, None)
    layers = hub.text_config.num_hidden_layers
    side = hub.vision_config.image_size // hub.vision_config.patch_size
    dtype = str(hub.dtype or hub.text_config.dtype or stored_dtype).removeprefix("torch.")
    return FocusLlavaConfig(
        vision=vision,
        text=text,
        image_token_id=hub.image_token_index,
        image_grid_pinpoints=tuple((height, width) for height, width in hub.image_grid_pinpoints),
        vision_feature_layer=hub.vision_feature_layer,
        projector_bias=hub.multimodal_projector_bias,
        image_mean=tuple(preprocessing["image_mean"]),
        image_std=tuple(preprocessing["image_std"]),
        eos_token_ids=_eos_token_ids(src, hub),
        vision_sampler=vision_sampler or VisionSamplerConfig(enabled=False, base_grid=(side, side)),
        text_sampler=TextSamplerConfig(
            layer=text_layer if text_layer is not None else min(max(1, round(layers / 4)), layers - 1),
            threshold=text_threshold,
        ),
        dtype=dtype,  # type: ignore[arg-type]
    )


def _eos_token_ids(src: pathlib.Path, hub: Any) -> tuple[int, ...]:
    """Of the generation config (else the text config) and of the tokenizer, whose end-of-turn token may be another."""
    if not (src / "tokenizer.json").is_file():
        raise InvalidInput(f"{src} has no tokenizer.json: save it with a fast tokenizer first", field="source")
    tokenizer = AutoTokenizer.from_pretrained(str(src), local_files_only=True)
    index = hub.image_token_index
    image_token = tokenizer.convert_ids_to_tokens(index) if index < len(tokenizer) else None
    if image_token is None or tokenizer(image_token, add_special_tokens=False).input_ids != [index]:
        raise InvalidInput(f"is {index}, which the tokenizer does not know", field="config.json image_token_index")
    path = src / "generation_config.json"
    declared = read_json(path).get("eos_token_id") if path.is_file() else None
    declared = hub.text_config.eos_token_id if declared is None else declared
    ids = [*(declared if isinstance(declared, list) else [declared]), tokenizer.eos_token_id]
    return tuple(sorted({int(i) for i in ids if i is not None}))


def chat_template(src: pathlib.Path) -> str:
    """The processor's template comes before the tokenizer's, which may know nothing of images."""
    if (src / "chat_template.json").is_file():
        template = read_json(src / "chat_template.json").get("chat_template")
    elif (src / "chat_template.jinja").is_file():
        template = (src / "chat_template.jinja").read_text("utf8")
    else:
        template = read_json(src / "tokenizer_config.json").get("chat_template")
    if not isinstance(template, str) or not template:
        raise InvalidInput(
            "is in none of chat_template.json, chat_template.jinja, tokenizer_config.json", field="template"
        )
    return template
