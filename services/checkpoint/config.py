"""The typed configuration of a checkpoint, read from and written to its config.json."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from transformers import CLIPVisionConfig, PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING

from services.common.errors import InvalidInput

MODEL_TYPE = "focusllava"
FORMAT_VERSION = 1
TEXT_FAMILIES = ("llama", "mistral", "qwen2")
Instruction = Literal["last_turn", "all_turns", "to_answer"]


@dataclass(frozen=True, kw_only=True)
class VisionSamplerConfig:
    """The vision-guided sampler (method, section 1)."""

    enabled: bool = True
    window: int = 4
    """w: side of a region, in tokens."""
    branches: tuple[tuple[int, int], ...] = ((1, 1), (2, 2), (4, 4))
    """Pooling kernel (height, width) of each branch, finest first; each must divide the window. (0, 0) drops the region
    (window 1 of Tab. 4)."""
    base_grid: tuple[int, int] = (24, 24)
    """Patches of the base tile; N of the context is their product."""
    similarity: Literal["inner_product", "normalized"] = "inner_product"
    region_pool: Literal["mean", "max"] = "mean"
    selector_input: Literal["base_tile", "region"] = "base_tile"
    probability_gate: Literal["paper", "straight_through", "counterfactual"] = "paper"
    base_tile: Literal["keep", "sample", "drop"] = "keep"
    balance_coefficients: tuple[float, ...] = (1.0, 1.0, 1.0)
    """c of Eq. 10, one a branch; rescaled to sum to the number of branches."""
    selector_temperature: float = 1.0
    """The selector's logits are multiplied by this; a larger value makes a small-lr selector move faster."""
    token_order: Literal["region", "row"] = "region"
    """How the tokens follow each other, see `services.sampler.vision_guided.TokenOrder`."""

    def module_options(self) -> dict[str, Any]:
        """Options of `services.sampler.vision_guided.VisionGuidedSampler`."""
        names = ("window", "branches", "similarity", "region_pool", "selector_input", "probability_gate", "token_order")
        return {**{name: getattr(self, name) for name in names}, "selector_temperature": self.selector_temperature}


@dataclass(frozen=True, kw_only=True)
class TextSamplerConfig:
    """The text-guided sampler (method, section 2)."""

    enabled: bool = True
    layer: int = 8
    """i: zero-based layer before which tokens are pruned."""
    threshold: float = 0.85
    """gamma: share of the summed importance that the kept tokens must reach."""
    instruction: Instruction = "last_turn"
    """Whose attention chooses: the last user turn's words, all user turns' words, or the last turn's words and the
    template's markers after them, which the answer starts from."""


@dataclass(frozen=True, kw_only=True)
class FocusLlavaConfig:
    """Everything needed to build both stages of one checkpoint."""

    vision: dict[str, Any]
    """Arguments of transformers' CLIPVisionConfig."""
    text: dict[str, Any]
    """Arguments of the decoder's config, with its `model_type` (llama, mistral or qwen2)."""
    image_token_id: int
    image_grid_pinpoints: tuple[tuple[int, int], ...]
    """Allowed (height, width) of the padded image, in pixels."""
    vision_stem: Literal["patch", "conv"] = "patch"
    """CLIP's single patch convolution, or a stack of strided convolutions (small models trained from nothing)."""
    vision_feature_layer: int = -2
    projector_bias: bool = True
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    eos_token_ids: tuple[int, ...] = ()
    vision_sampler: VisionSamplerConfig = field(default_factory=VisionSamplerConfig)
    text_sampler: TextSamplerConfig = field(default_factory=TextSamplerConfig)
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """The dtype the weights are stored in."""

    def __post_init__(self) -> None:
        family = self.text.get("model_type")
        if family not in TEXT_FAMILIES:
            raise InvalidInput(f"is {family!r}, expected one of {', '.join(TEXT_FAMILIES)}", field="text.model_type")
        sampler, layers = self.vision_sampler, self.text_config.num_hidden_layers
        if not 0 < self.text_sampler.layer < layers:
            raise InvalidInput(f"is {self.text_sampler.layer}, expected 1..{layers - 1}", field="text_sampler.layer")
        if not 0 < self.text_sampler.threshold <= 1:
            raise InvalidInput(f"is {self.text_sampler.threshold}, expected (0, 1]", field="text_sampler.threshold")
        if len(sampler.balance_coefficients) != len(sampler.branches):
            raise InvalidInput(
                f"has {len(sampler.balance_coefficients)} values for {len(sampler.branches)} branches",
                field="vision_sampler.balance_coefficients",
            )
        if sampler.window < 1:
            raise InvalidInput(f"is {sampler.window}, expected 1 or more", field="vision_sampler.window")
        if not sampler.branches:
            raise InvalidInput("is empty", field="vision_sampler.branches")
        if min(sampler.balance_coefficients) < 0 or not sum(sampler.balance_coefficients):
            raise InvalidInput(
                f"is {sampler.balance_coefficients}, expected none below 0 and one above",
                field="vision_sampler.balance_coefficients",
            )
        if sampler.selector_temperature <= 0:
            raise InvalidInput(
                f"is {sampler.selector_temperature}, expected above 0", field="vision_sampler.selector_temperature"
            )
        for height, width in sampler.branches:
            if (height, width) == (0, 0):  # drops the region
                continue
            if height < 1 or width < 1:
                raise InvalidInput(f"has {(height, width)}, expected 1 or more", field="vision_sampler.branches")
            if sampler.window % height or sampler.window % width:
                raise InvalidInput(
                    f"has {(height, width)}, which does not divide the window of {sampler.window}",
                    field="vision_sampler.branches",
                )
        for height, width in self.image_grid_pinpoints:
            if height % self.tile_px or width % self.tile_px:
                raise InvalidInput(
                    f"has {(height, width)}, not a multiple of the tile's {self.tile_px} px",
                    field="image_grid_pinpoints",
                )

    @property
    def vision_config(self) -> CLIPVisionConfig:
        return CLIPVisionConfig(**self.vision)

    @property
    def text_config(self) -> PreTrainedConfig:
        return CONFIG_MAPPING[self.text["model_type"]](**{k: v for k, v in self.text.items() if k != "model_type"})

    @property
    def tile_px(self) -> int:
        return self.vision["image_size"]

    @property
    def patches_per_side(self) -> int:
        return self.vision["image_size"] // self.vision["patch_size"]

    def to_dict(self) -> dict[str, Any]:
        raw = {"model_type": MODEL_TYPE, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        # Younger than the format: written where it says something, so that older checkpoints keep their fingerprints.
        if self.text_sampler.instruction == TextSamplerConfig.instruction:
            del raw["text_sampler"]["instruction"]
        if self.vision_sampler.token_order == VisionSamplerConfig.token_order:
            del raw["vision_sampler"]["token_order"]
        return raw

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> FocusLlavaConfig:
        """Raises InvalidInput naming the first field that is unknown, missing or of the wrong value."""
        raw = dict(raw)
        if raw.pop("model_type", None) != MODEL_TYPE:
            raise InvalidInput(f"expected {MODEL_TYPE!r}: is this a FocusLLaVA checkpoint?", field="model_type")
        version = raw.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise InvalidInput(f"is {version!r}, this program reads {FORMAT_VERSION}", field="format_version")
        return _build(cls, raw, "")

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> FocusLlavaConfig:
        path = pathlib.Path(folder) / "config.json"
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf8")))
        except FileNotFoundError:
            raise InvalidInput(f"{folder} has no config.json", field="checkpoint") from None
        except json.JSONDecodeError as error:
            raise InvalidInput(f"{path} is not JSON: {error}", field="checkpoint") from None

    def save(self, folder: str | pathlib.Path) -> None:
        path = pathlib.Path(folder) / "config.json"
        path.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf8")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _build(cls: type, raw: dict[str, Any], prefix: str) -> Any:
    hints = get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    for name in raw:
        if name not in known:
            raise InvalidInput(f"unknown field with value {raw[name]!r}", field=f"{prefix}{name}")
    values: dict[str, Any] = {}
    for name, spec in known.items():
        if name not in raw:
            if spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
                raise InvalidInput("is missing", field=f"{prefix}{name}")
            continue
        value, hint = raw[name], hints[name]
        if dataclasses.is_dataclass(hint):
            value = _build(hint, value, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif hint not in (dict[str, Any],):
            value = _tuples(value)
        choices = get_args(hint) if getattr(hint, "__origin__", None) is Literal else ()
        if choices and value not in choices:
            raise InvalidInput(f"is {value!r}, expected one of {', '.join(choices)}", field=f"{prefix}{name}")
        values[name] = value
    return cls(**values)
