"""The typed configuration of a checkpoint, read from and written to its config.json."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPVisionConfig, PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING

from services.common.errors import InvalidInput
from services.common.settings import Count, Range, Share, build_settings, check_settings, require

MODEL_TYPE = "focusllava"
FORMAT_VERSION = 1
TEXT_FAMILIES = ("llama", "mistral", "qwen2")
Instruction = Literal["last_turn", "all_turns", "to_answer"]


@dataclass(frozen=True, kw_only=True)
class VisionSamplerConfig:
    """The vision-guided sampler (method, section 1)."""

    enabled: bool = True
    window: Count = 4
    """w: side of a region, in tokens."""
    branches: tuple[tuple[int, int], ...] = ((1, 1), (2, 2), (4, 4))
    """Pooling kernel (height, width) of each branch, finest first; each must divide the window. (0, 0) drops the region
    (window 1 of Tab. 4)."""
    base_grid: tuple[int, int] = (24, 24)
    """Patches of the base tile, (rows, columns): a record, the model takes them from `vision`."""
    similarity: Literal["inner_product", "normalized"] = "inner_product"
    region_pool: Literal["mean", "max"] = "mean"
    selector_input: Literal["base_tile", "region"] = "base_tile"
    probability_gate: Literal["paper", "straight_through", "counterfactual"] = "paper"
    base_tile: Literal["keep", "sample", "drop"] = "keep"
    balance_coefficients: tuple[float, ...] = (1.0, 1.0, 1.0)
    """c of Eq. 10, one a branch; rescaled to sum to the number of branches."""
    selector_temperature: Annotated[float, Range(0, above=True)] = 1.0
    """The selector's logits are multiplied by this; a larger value makes a small-lr selector move faster."""
    token_order: Literal["region", "row"] = "region"
    """How the tokens follow each other, see `services.sampler.vision_guided.TokenOrder`."""

    def __post_init__(self) -> None:
        check_settings(self)
        require(bool(self.branches), "branches", self.branches, "one or more")
        coefficients = self.balance_coefficients
        if len(coefficients) != len(self.branches):
            found = f"has {len(coefficients)} values for {len(self.branches)} branches"
            raise InvalidInput(found, field="balance_coefficients")
        uses = min(coefficients) >= 0 and sum(coefficients) > 0
        require(uses, "balance_coefficients", coefficients, "none below 0 and one above")
        for kernel in self.branches:
            if kernel == (0, 0):  # drops the region
                continue
            if min(kernel) < 1:
                raise InvalidInput(f"has {kernel}, expected 1 or more", field="branches")
            if any(self.window % side for side in kernel):
                found = f"has {kernel}, which does not divide the window of {self.window}"
                raise InvalidInput(found, field="branches")

    def module_options(self) -> dict[str, Any]:
        """Options of `services.sampler.vision_guided.VisionGuidedSampler`."""
        names = ("window", "branches", "similarity", "region_pool", "selector_input", "probability_gate",
                 "selector_temperature", "token_order")  # fmt: skip
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class TextSamplerConfig:
    """The text-guided sampler (method, section 2)."""

    enabled: bool = True
    layer: int = 8
    """i: zero-based layer before which tokens are pruned."""
    threshold: Share = 0.85
    """gamma: share of the summed importance that the kept tokens must reach."""
    instruction: Instruction = "last_turn"
    """The words whose attention chooses: the last user turn's, all user turns' words, or the last turn's words and the
    template's markers after them, which the answer starts from."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class FocusLlavaConfig:
    """Everything needed to build both stages of one checkpoint."""

    vision: dict[str, Any]
    """Arguments of transformers' CLIPVisionConfig."""
    text: dict[str, Any]
    """Arguments of the decoder's config, with its `model_type` (llama, mistral or qwen2)."""
    image_token_id: Annotated[int, Range(0)]
    image_grid_pinpoints: tuple[tuple[int, int], ...]
    """Allowed (height, width) of the padded image, in pixels."""
    vision_stem: Literal["patch", "conv"] = "patch"
    """CLIP's single patch convolution, or a stack of strided convolutions (small models trained from nothing)."""
    vision_feature_layer: int = -2
    projector_bias: bool = True
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    reduced_jpeg: bool = False
    """Whether large JPEGs are decoded at reduced scale, in training and serving alike; False decodes every pixel, as
    Hugging Face does. A request may say otherwise."""
    eos_token_ids: tuple[int, ...] = ()
    vision_sampler: VisionSamplerConfig = field(default_factory=VisionSamplerConfig)
    text_sampler: TextSamplerConfig = field(default_factory=TextSamplerConfig)
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """The dtype the weights are stored in."""

    def __post_init__(self) -> None:
        check_settings(self)
        family = self.text.get("model_type")
        require(family in TEXT_FAMILIES, "text.model_type", family, f"one of {', '.join(TEXT_FAMILIES)}")
        for name in ("image_size", "patch_size"):
            size: Any = self.vision.get(name)
            require(type(size) is int and size > 0, f"vision.{name}", size, "a whole number above 0")
        require(self.patches_per_side > 0, "vision.patch_size", self.vision["patch_size"], f"at most {self.tile_px}")
        layers = _layers("text", lambda: self.text_config)
        layer = self.text_sampler.layer
        require(0 < layer < layers, "text_sampler.layer", layer, f"1..{layers - 1}")
        layers = _layers("vision", lambda: self.vision_config)
        layer = self.vision_feature_layer
        require(-layers - 1 <= layer <= layers, "vision_feature_layer", layer, f"{-layers - 1}..{layers}")
        require(min(self.image_std) > 0, "image_std", self.image_std, "all above 0")
        require(bool(self.image_grid_pinpoints), "image_grid_pinpoints", self.image_grid_pinpoints, "one or more")
        for size_hw in self.image_grid_pinpoints:
            if min(size_hw) < 1 or any(side % self.tile_px for side in size_hw):
                raise InvalidInput(
                    f"has {size_hw}, not a multiple of the tile's {self.tile_px} px", field="image_grid_pinpoints"
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
        if not self.reduced_jpeg:
            del raw["reduced_jpeg"]
        return raw

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> FocusLlavaConfig:
        """Raises InvalidInput naming the first field that is unknown, missing or of the wrong value."""
        require(isinstance(raw, dict), "config.json", raw, "an object")
        raw = dict(raw)
        family = raw.pop("model_type", None)
        require(family == MODEL_TYPE, "model_type", family, f"{MODEL_TYPE!r}: is this a FocusLLaVA checkpoint?")
        version = raw.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise InvalidInput(f"is {version!r}, this program reads {FORMAT_VERSION}", field="format_version")
        return build_settings(cls, raw)

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> FocusLlavaConfig:
        path = pathlib.Path(folder) / "config.json"
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf8")))
        except FileNotFoundError:
            raise InvalidInput(f"{folder} has no config.json", field="checkpoint") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InvalidInput(f"{path} is not JSON: {error}", field="checkpoint") from None

    def save(self, folder: str | pathlib.Path) -> None:
        path = pathlib.Path(folder) / "config.json"
        path.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf8")


def as_tuples(value: Any) -> Any:
    """JSON's lists, which our fields hold as tuples."""
    return tuple(map(as_tuples, value)) if isinstance(value, list | tuple) else value


def _layers(field: str, build: Callable[[], Any]) -> int:
    """Layers of a part whose fields transformers checks, and names."""
    try:
        return build().num_hidden_layers
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise InvalidInput(f"is no config of its family: {' '.join(str(error).split())}", field=field) from None
