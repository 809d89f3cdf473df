"""The one list, for import and for serving, of checkpoints that this program computes as their authors meant."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from services.checkpoint.config import FocusLlavaConfig
from services.common.errors import InvalidInput
from services.common.settings import require

# "dynamic" and "longrope" choose their frequencies by the longest sequence of a batch: a batch would change answers.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_USUAL_ACTIVATIONS = ("silu", "gelu", "quick_gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
"""Names of transformers' list that are known without importing it, which takes seconds."""
TEXT_TOKENS = 128
"""What a chat template and a question of some sentences take of the context beside an image."""


def check_servable(config: FocusLlavaConfig) -> None:
    """Raises InvalidInput for the first field with which serving would refuse the checkpoint, or fail at a request."""
    check_decoder(config.text_config)
    _check_activation("vision.hidden_act", config.vision_config.hidden_act)
    check_context(config, config.text_config.max_position_embeddings, "text.max_position_embeddings")


def check_context(config: FocusLlavaConfig, context: int, field: str) -> None:
    """Raises InvalidInput for a context that the largest image does not fit in with a question."""
    least = largest_image(config)[1] + TEXT_TOKENS
    height, width = largest_image(config)[0]
    require(
        context >= least,
        field,
        context,
        f"{least} or more: an image of {width} x {height} px alone is {least - TEXT_TOKENS} visual tokens",
    )


def largest_image(config: FocusLlavaConfig) -> tuple[tuple[int, int], int]:
    """(height, width) in pixels of the image that makes the most visual tokens, and how many they are.

    No sampler's work is counted, for a request may turn the samplers off.
    """

    def tokens(size_hw: tuple[int, int]) -> int:
        height, width = (side // config.tile_px * config.patches_per_side for side in size_hw)
        return config.patches_per_side**2 + height * (width + 1)

    size_hw = max(config.image_grid_pinpoints, key=lambda size: (tokens(size), size))
    return size_hw, tokens(size_hw)


def check_decoder(config: PreTrainedConfig) -> None:
    """Raises InvalidInput for a decoder that would not compute what its authors meant, or nothing at all."""
    context = config.max_position_embeddings
    window = _window(config)
    if window is not None and window < context:
        raise InvalidInput(
            f"is {window}, smaller than max_position_embeddings {context}: windowed attention is not supported; "
            f"set sliding_window to null or lower max_position_embeddings to {window}",
            field="text.sliding_window",
        )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    require(heads % kv_heads == 0, "text.num_key_value_heads", kv_heads, f"a divisor of the {heads} attention heads")
    head_dim = head_width(config)
    require(head_dim % 2 == 0, "text.head_dim", head_dim, "an even number: rotary embedding turns pairs")
    _check_activation("text.hidden_act", config.hidden_act)
    _check_rotary(config, head_dim)


def head_width(config: PreTrainedConfig) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _window(config: PreTrainedConfig) -> int | None:
    """The attention window of any layer. Llama has none, yet transformers applies one that stands in its config."""
    if not getattr(config, "use_sliding_window", True):
        return None
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and set(kinds) == {"full_attention"}:
        return None
    return getattr(config, "sliding_window", None)


def _check_activation(field: str, name: Any) -> None:
    if name not in _USUAL_ACTIVATIONS:
        from transformers.activations import ACT2FN

        require(name in ACT2FN, field, name, "an activation that transformers knows")


def _check_rotary(config: PreTrainedConfig, head_dim: int) -> None:
    parameters = config.rope_parameters or {}
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise InvalidInput(f"is {rope_type!r}, expected one of {', '.join(ROPE_TYPES)}", field="text.rope_type")
    if rope_type == "default":  # the families' own, which turns whole heads whatever else stands there
        return
    try:
        frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](config)
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise InvalidInput(f"{parameters} cannot be computed: {error!r}", field="text.rope_parameters") from None
    turned = 2 * len(frequencies)
    if turned != head_dim:
        raise InvalidInput(
            f"is {parameters.get('partial_rotary_factor')}: of a head's {head_dim} dimensions {turned} would be "
            f"turned, which {config.model_type} layers do not compute; leave it out",
            field="text.partial_rotary_factor",
        )
    if not (frequencies.isfinite().all() and math.isfinite(scaling)):
        raise InvalidInput(f"of type {rope_type!r} give frequencies that are not finite", field="text.rope_parameters")
