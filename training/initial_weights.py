"""What a stage of training starts from: a checkpoint, a vision stage's tower, or fresh layers that can learn."""

from __future__ import annotations

import pathlib
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from services.checkpoint.config import FocusLlavaConfig
from services.common.errors import InvalidInput
from services.encoder.model import EncoderModel
from services.modeling.config import FocusLlavaModelConfig
from services.modeling.model import FocusLlavaForConditionalGeneration


def load_model(
    folder: str | pathlib.Path, config: FocusLlavaConfig, dtype: torch.dtype
) -> FocusLlavaForConditionalGeneration:
    """A checkpoint's model, in train mode. A sampler of another shape (another window, say) starts fresh.

    Raises InvalidInput where other weights do not fit the configuration.
    """
    model, found = FocusLlavaForConditionalGeneration.from_pretrained(
        folder,
        config=FocusLlavaModelConfig.of(config),
        dtype=dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    wrong = [str(key) for key in (*found["mismatched_keys"], *found["missing_keys"])]
    if lost := [key for key in wrong if "vision_guided_sampler." not in key]:
        raise InvalidInput(f"{folder} does not fit the model: {lost[:3]}", field="init_from")
    align(model)
    return model.train()


def align(module: nn.Module) -> None:
    """Moves weights that do not begin at a multiple of 16 bytes.

    In the dtype of their file they lie in its memory, of bfloat16 at any even address, and DeepSpeed's partitions of a
    group of one weight have to begin at a multiple of 4.
    """
    for parameter in module.parameters():
        if parameter.data_ptr() % 16:
            parameter.data = parameter.data.clone()


@torch.no_grad()
def initialise_decoder(language_model: PreTrainedModel) -> None:
    """Lets a token's own content outweigh what fresh layers add to it: unit embeddings, small writes to the stream.

    With the library's initialisation two fresh layers bury it: of the colour that a question asks for, nothing could be
    read from the last prompt token, and no pre-training step got a hold.
    """
    embeddings: Any = language_model.get_input_embeddings()
    embeddings.weight.normal_()
    layers: Any = language_model.model.layers
    for layer in layers:
        layer.self_attn.o_proj.weight.mul_((2 * len(layers)) ** -0.5)
        layer.mlp.down_proj.weight.mul_((2 * len(layers)) ** -0.5)


@torch.no_grad()
def standardise_projector(encoder: EncoderModel, pixels_T3HW: torch.Tensor) -> None:
    """Gives a fresh projector's outputs zero mean and unit standard deviation in every dimension.

    Patch features share a large common part. Left in, it drowns what tells patches apart, and attention cannot choose.
    """
    last = encoder.multi_modal_projector.linear_2
    outputs = encoder.multi_modal_projector(encoder.patch_features(pixels_T3HW)).flatten(0, 1)
    scale_D = 1 / outputs.std(0)
    last.weight.mul_(scale_D.unsqueeze(1))
    last.bias.copy_((last.bias - outputs.mean(0)) * scale_D)


def load_vision(source: pathlib.Path) -> dict[str, torch.Tensor]:
    """The vision tower's weights of a vision stage's export."""
    path = source / "vision.safetensors"
    if not path.exists():
        raise InvalidInput(f"{source} holds neither config.json nor vision.safetensors", field="init_from")
    prefix = "vision_tower."
    return {k.removeprefix(prefix): v for k, v in load_file(path).items() if k.startswith(prefix)}
