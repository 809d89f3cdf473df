"""How many numbers the weights of each part are, and how many of them a run trains: counted on the meta device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.supported import head_width
from services.modeling.config import FocusLlavaModelConfig
from services.modeling.model import FocusLlavaForConditionalGeneration
from training.config import RunConfig
from training.optimizer import LANGUAGE_MODEL, PROJECTOR, SELECTOR, TOWER, parameter_groups, part_of

PARTS = (LANGUAGE_MODEL, TOWER, PROJECTOR, SELECTOR)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank updates of the decoder's linear layers, in place of its own weights."""

    rank: int
    targets: tuple[str, ...]
    """Names of the layers, as `q_proj`."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The parts that learn."""

    vision_tower: bool = True
    projector: bool = True
    selector: bool = True
    language_model: bool = True
    """Whether its own weights learn."""
    lora: Lora | None = None

    @property
    def anything_below(self) -> bool:
        """Whether the backward pass goes through the decoder at all."""
        return self.vision_tower or self.projector or self.selector or self.language_model or self.lora is not None


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of the weights by part; adapters are the language model's."""

    total: Mapping[str, int]
    trained: Mapping[str, int]

    @property
    def all(self) -> int:
        return sum(self.total.values())

    @property
    def learning(self) -> int:
        return sum(self.trained.values())


def meta_model(model: FocusLlavaConfig) -> nn.Module:
    """The model on the meta device: shapes and names, no memory."""
    with torch.device("meta"):
        return FocusLlavaForConditionalGeneration(FocusLlavaModelConfig.of(model))


def count_parameters(model: FocusLlavaConfig, run: RunConfig, lora: Lora | None = None) -> tuple[Parameters, Trained]:
    """Counts what there is and what the run's parameter groups hold. Raises InvalidInput as they do."""
    module = meta_model(model)
    if lora is not None:
        module.get_submodule("language_model").requires_grad_(False)
    trained = dict.fromkeys(PARTS, 0)
    for group in parameter_groups(module, run):
        trained[group["part"]] += sum(parameter.numel() for parameter in group["params"])
    total = dict.fromkeys(PARTS, 0)
    for name, parameter in module.named_parameters():
        total[part_of(name)] += parameter.numel()
    flags = {part: trained[part] > 0 for part in PARTS}
    if lora is not None:
        trained[LANGUAGE_MODEL] = adapters = lora_elements(model, lora)
        total[LANGUAGE_MODEL] += adapters
    return Parameters(total=total, trained=trained), Trained(**flags, lora=lora)


def linear_shapes(model: FocusLlavaConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each linear layer of one decoder layer, by its name."""
    text = model.text_config
    width, inner, head = text.hidden_size, text.intermediate_size, head_width(text)
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    return {
        "q_proj": (width, queries),
        "k_proj": (width, keys),
        "v_proj": (width, keys),
        "o_proj": (queries, width),
        "gate_proj": (width, inner),
        "up_proj": (width, inner),
        "down_proj": (inner, width),
    }


def lora_elements(model: FocusLlavaConfig, lora: Lora) -> int:
    """Numbers of all adapters' weights."""
    shapes = linear_shapes(model)
    widths: Iterable[int] = (sum(shapes[name]) for name in lora.targets)
    return model.text_config.num_hidden_layers * lora.rank * sum(widths)
