"""The small files of a LLaVA-NeXT checkpoint of the hub, read into our config."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, LlavaNextConfig

from services.checkpoint.config import (
    TEXT_FAMILIES,
    FocusLlavaConfig,
    TextSamplerConfig,
    VisionSamplerConfig,
    as_tuples,
)
from services.checkpoint.supported import check_servable
from services.common.errors import InvalidInput

PREPROCESSING = {
    "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
    "resample": 3, "rescale_factor": 1 / 255,
}  # fmt: skip
LIBRARY_FIELDS = ("transformers_version", "architectures", "dtype", "use_cache", "_name_or_path")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InvalidInput where there is no file, or no object in it."""
    try:
        value = json.loads(path.read_text("utf8"))
    except FileNotFoundError:
        raise InvalidInput(f"{path.parent} has no {path.name}", field="source") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} is not JSON: {error}", field="source") from None
    if not isinstance(value, dict):
        raise InvalidInput(f"{path} holds {value!r:.80}, expected an object", field="source")
    return value


def read_hub_config(src: pathlib.Path) -> Any:
    """The hub's LlavaNextConfig, once it is sure that this program computes what it describes."""
    raw = read_json(src / "config.json")
    if raw.get("model_type") != "llava_next":
        raise InvalidInput(f"is {raw.get('model_type')!r}, expected 'llava_next'", field="config.json model_type")
    for part in (raw, raw.get("text_config"), raw.get("vision_config")):
        for name in ("dtype", "torch_dtype"):
            if isinstance(part, dict) and part.get(name) == "auto":
                del part[name]  # says no more than the tensors do
    try:
        hub: Any = LlavaNextConfig.from_dict(raw)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidInput(f"is not a LLaVA-NeXT config: {error}", field="config.json") from None
    text, vision = hub.text_config, hub.vision_config
    supported: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "text_config.model_type": (text.model_type, TEXT_FAMILIES),
        "vision_config.model_type": (vision.model_type, ("clip_vision_model",)),
        "vision_feature_select_strategy": (hub.vision_feature_select_strategy, ("default",)),
        "projector_hidden_act": (hub.projector_hidden_act, ("gelu",)),
    }
    for where in ("", "text_config", "vision_config"):
        part = raw.get(where) if where else raw
        if isinstance(part, dict):
            supported[f"{where}.quantization_config".lstrip(".")] = (part.get("quantization_config"), (None,))
    for field, (value, allowed) in supported.items():
        if value not in allowed:
            raise InvalidInput(f"is {value!r}, supported: {', '.join(map(str, allowed))}", field=f"config.json {field}")
    if not isinstance(hub.vision_feature_layer, int):
        found = f"is {hub.vision_feature_layer}, only a single layer is supported"
        raise InvalidInput(found, field="config.json vision_feature_layer")
    return hub


def _preprocessing(src: pathlib.Path, hub: Any) -> dict[str, Any]:
    """The image processor's settings, null ones left out; refuses what our tiling does not do."""
    raw, where = _processor(src)
    raw = {name: value for name, value in raw.items() if value is not None}
    for name, value in PREPROCESSING.items():
        found = raw.get(name, value)
        if not isinstance(found, int | float) or not abs(found - value) <= 1e-9:
            raise InvalidInput(f"is {found!r}, supported: {value!r}", field=f"{where} {name}")
    tile = hub.vision_config.image_size
    for name in ("size", "crop_size"):
        size = raw.get(name, tile)
        edges = size.values() if isinstance(size, dict) else size if isinstance(size, list) else [size]
        if any(edge not in (tile, None) for edge in edges):
            raise InvalidInput(f"is {size!r}, the vision tower takes {tile} px", field=f"{where} {name}")
    pinpoints = raw.get("image_grid_pinpoints", hub.image_grid_pinpoints)
    if _sorted(pinpoints) != _sorted(hub.image_grid_pinpoints):
        found = f"is {pinpoints!r}, config.json has {hub.image_grid_pinpoints!r}"
        raise InvalidInput(found, field=f"{where} image_grid_pinpoints")
    for name in ("image_mean", "image_std"):
        if name not in raw:
            raise InvalidInput("is missing", field=f"{where} {name}")
    return raw


def _processor(src: pathlib.Path) -> tuple[dict[str, Any], str]:
    """The image processor's settings as they stand, and the file that holds them.

    Settings nested in the processor's file come first, as in transformers, whose save_pretrained writes that file and
    leaves an older one beside it as it was.
    """
    path = src / "processor_config.json"
    nested = read_json(path).get("image_processor") if path.is_file() else None
    if nested is None:
        path = src / "preprocessor_config.json"
        return read_json(path), path.name
    if not isinstance(nested, dict):
        raise InvalidInput(f"is {nested!r:.80}, expected an object", field=f"{path.name} image_processor")
    return nested, f"{path.name} image_processor"


def _sorted(pinpoints: Any) -> Any:
    return sorted(map(json.dumps, pinpoints)) if isinstance(pinpoints, list | tuple) else pinpoints


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
        {name: value for name, value in part.to_diff_dict().items() if name not in LIBRARY_FIELDS}
        for part in (hub.text_config, hub.vision_config)
    )
    text["tie_word_embeddings"] = bool(hub.tie_word_embeddings or hub.text_config.tie_word_embeddings)
    for name in ("model_type", "vocab_size"):
        vision.pop(name, None)
    layers = hub.text_config.num_hidden_layers
    side = hub.vision_config.image_size // hub.vision_config.patch_size
    vision |= {"image_size": hub.vision_config.image_size, "patch_size": hub.vision_config.patch_size}
    dtype = str(hub.dtype or hub.text_config.dtype or stored_dtype).removeprefix("torch.")
    config = FocusLlavaConfig(
        vision=vision,
        text=text,
        image_token_id=hub.image_token_index,
        image_grid_pinpoints=as_tuples(hub.image_grid_pinpoints),
        vision_feature_layer=hub.vision_feature_layer,
        projector_bias=hub.multimodal_projector_bias,
        image_mean=as_tuples(preprocessing["image_mean"]),
        image_std=as_tuples(preprocessing["image_std"]),
        eos_token_ids=_eos_token_ids(src, hub),
        vision_sampler=vision_sampler or VisionSamplerConfig(enabled=False, base_grid=(side, side)),
        text_sampler=TextSamplerConfig(
            layer=text_layer if text_layer is not None else min(max(1, round(layers / 4)), layers - 1),
            threshold=text_threshold,
        ),
        dtype=dtype,  # type: ignore[arg-type]
    )
    try:
        check_servable(config)
    except InvalidInput as error:  # names our field; the user has the hub's file open
        part, _, name = error.field.partition(".")
        message = str(error).removeprefix(f"{error.field}: ")
        raise InvalidInput(message, field=f"config.json {part}_config.{name}") from None
    return config


def _eos_token_ids(src: pathlib.Path, hub: Any) -> tuple[int, ...]:
    """Ids of the generation config (else the text config), and the tokenizer's, whose end of a turn may be another."""
    if not (src / "tokenizer.json").is_file():
        raise InvalidInput(f"{src} has no tokenizer.json: save it with a fast tokenizer first", field="source")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(src), config=hub, local_files_only=True)
    except Exception as error:  # of any kind: tokenizers raises the bare class
        raise InvalidInput(f"cannot be read: {type(error).__name__}: {error}", field="tokenizer.json") from None
    index = hub.image_token_index
    image_token = tokenizer.convert_ids_to_tokens(index) if index < len(tokenizer) else None
    if image_token is None or tokenizer(image_token, add_special_tokens=False).input_ids != [index]:
        raise InvalidInput(f"is {index}, which the tokenizer does not know", field="config.json image_token_index")
    return declared_ends(src, hub.text_config.eos_token_id, tokenizer, "config.json text_config.eos_token_id")


def declared_ends(src: pathlib.Path, configured: Any, tokenizer: Any, field: str) -> tuple[int, ...]:
    """Ids that end an answer: the generation config's, else `configured`, which `field` names; and the tokenizer's."""
    path = src / "generation_config.json"
    declared = read_json(path).get("eos_token_id") if path.is_file() else None
    field = field if declared is None else f"{path.name} eos_token_id"
    declared = configured if declared is None else declared
    ids = [*(declared if isinstance(declared, list) else [declared]), tokenizer.eos_token_id]
    if any(not isinstance(i, int | None) for i in ids):
        raise InvalidInput(f"is {declared!r}, expected a token id or several", field=field)
    return tuple(sorted({i for i in ids if i is not None}))


def chat_template(src: pathlib.Path) -> str:
    """The processor's template comes before the tokenizer's, which may know nothing of images."""
    if (src / "chat_template.json").is_file():
        template = read_json(src / "chat_template.json").get("chat_template")
    elif (path := src / "chat_template.jinja").is_file():
        try:
            template = path.read_text("utf8")
        except UnicodeDecodeError as error:
            raise InvalidInput(f"is not UTF-8: {error}", field=path.name) from None
    else:
        template = read_json(src / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        defaults = [e.get("template") for e in template if isinstance(e, dict) and e.get("name") == "default"]
        if not defaults:
            raise InvalidInput(f"is {template!r:.80}, expected one of them named default", field="chat_template")
        template = defaults[0]
    if not isinstance(template, str) or not template:
        raise InvalidInput(
            "is in none of chat_template.json, chat_template.jinja, tokenizer_config.json", field="template"
        )
    return template
