"""Bytes that a training step takes on one device, by part, from shapes alone: checked against measured peaks in tests.

What autograd keeps of a layer is what its backward pass reads: a linear layer's input where its weight learns, the
inputs of a product, the queries, keys, values and result of attention, float32 copies in norms.

Legend: C and F widths of the vision tower, D and F of the decoder, N tokens, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.sizing import CUDA_BYTES
from services.checkpoint.supported import head_width
from services.encoder.vision_tower import feature_depth
from services.modeling.loss import CHUNK
from training.plan.parameters import Parameters, Trained
from training.plan.workload import Workload

ZeroStage = Literal[0, 1, 2, 3]
STAGES: tuple[ZeroStage, ...] = (0, 1, 2, 3)
BUCKET = 500_000_000
"""Numbers in one of DeepSpeed's buckets of gradients; two are in flight."""
GATHERED = 1_000_000_000
"""Numbers of gathered weights that ZeRO-3 keeps at most."""
COMMUNICATION_BYTES = 2**30
"""NCCL's buffers."""
FLOAT32 = 4
SAMPLER_COPIES = {"paper": 4, "straight_through": 4, "counterfactual": 6}
"""Copies of the feature map that the vision-guided sampler keeps, by gate: regions, those masked for the coarser pools,
their results, and with the last gate the branches that it compares."""
ADAM = 3 * FLOAT32
"""Bytes a number of AdamW's float32 state: the master weight and two moments."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    """What the forward pass leaves for the backward pass."""
    working: int
    """What the backward pass adds at its worst: the head's logits, or a layer that is computed again."""
    at_step: int = 0
    """Gradients in float32 while the optimizer takes its step, when there are no activations."""

    @property
    def total(self) -> int:
        passing = max(self.activations + self.working, self.at_step)
        return self.weights + self.gradients + self.optimizer + self.buffers + passing


def states(
    parameters: Parameters,
    *,
    zero: ZeroStage,
    devices: int,
    itemsize: int = 2,
    offload: Literal["none", "optimizer", "all"] = "none",
) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer and what the step adds, as DeepSpeed shards them (fields of `Memory`).

    itemsize: bytes of a weight; below 4 the optimizer holds master weights in float32.
    """
    shards = {name: devices if zero >= least else 1 for name, least in (("optimizer", 1), ("gradients", 2))}
    weights = parameters.all * itemsize
    weights = weights // devices if zero == 3 else weights
    a_number = ADAM if itemsize < FLOAT32 else ADAM - FLOAT32
    on_host, at_host = offload != "none", offload == "all" and zero == 3
    return {
        "weights": 0 if at_host else weights,
        "gradients": parameters.learning * itemsize // shards["gradients"],
        "optimizer": 0 if on_host else parameters.learning * a_number // shards["optimizer"],
        "at_step": 0 if on_host else parameters.learning * FLOAT32 // shards["optimizer"] * (itemsize < FLOAT32),
    }


def on_host(
    parameters: Parameters, *, zero: ZeroStage, itemsize: int = 2, offload: Literal["none", "optimizer", "all"] = "none"
) -> int:
    """Bytes in the hosts' memory, of all devices together.

    Of a number that learns: AdamW's state, its gradient in float32, its weight on the way back to the device. Of all
    numbers their weights, where these wait there too.
    """
    if offload == "none":
        return 0
    weights = parameters.all * itemsize if offload == "all" and zero == 3 else 0
    return parameters.learning * (ADAM + FLOAT32 + itemsize) + weights


def buffers(parameters: Parameters, *, zero: ZeroStage, devices: int, itemsize: int = 2) -> int:
    """Bytes of CUDA's context, of NCCL where there are several devices, and of DeepSpeed's buckets."""
    if devices == 1:
        return CUDA_BYTES
    bucket = 2 * min(BUCKET, parameters.learning) * itemsize if zero else 0
    gathered = min(GATHERED, parameters.all) * itemsize if zero == 3 else 0
    return CUDA_BYTES + COMMUNICATION_BYTES + bucket + gathered


def activations(
    model: FocusLlavaConfig,
    trained: Trained,
    work: Workload,
    *,
    samples: int,
    checkpointing: bool,
    itemsize: int = 2,
    fused: bool = True,
) -> tuple[int, int]:
    """(bytes that the forward pass leaves for the backward pass, bytes that this adds to them at its worst).

    Both are of the draw of a prune layer that takes most. The worst is the head's logits, or with checkpointing a
    layer that is computed again. fused: see `decoder_layer`.
    """
    text = model.text_config
    hidden = text.hidden_size * itemsize
    layer = decoder_layer(model, trained, itemsize, fused=fused)
    a_pass = layer * checkpointing + decoder_gradients(model, itemsize)
    head = logits(model, trained, samples * work.answer_tokens, itemsize=itemsize)
    before = encoder(model, trained, work, itemsize, checkpointing=checkpointing)
    tower = tower_layer(model, itemsize) * work.tiles * trained.vision_tower
    peaks = []
    for tokens_L in work.draws(text.num_hidden_layers):
        kept = before + tokens_L[0] * (hidden + 2 * FLOAT32 * head_width(text))  # what enters, and rotary tables
        peaks.append((kept + tower * (1 + checkpointing), kept))
        for tokens in tokens_L:
            kept += tokens * (hidden if checkpointing else layer)
            peaks.append((kept + tokens * a_pass, kept))
        # The final norm, and what it and the head read of the answers.
        kept += min(work.answer_tokens, tokens_L[-1]) * (FLOAT32 + 3 * itemsize) * text.hidden_size
        peaks.append((kept + head // samples, kept))
    left = max(kept for _, kept in peaks)
    return samples * left, samples * (max(peak for peak, _ in peaks) - left)


def decoder_layer(model: FocusLlavaConfig, trained: Trained, itemsize: int, *, fused: bool = True) -> int:
    """Bytes that a decoder layer keeps of one token.

    fused: one call of flash attention for all sequences; else keys and values are repeated for every query head, and
    the sequences' results joined, as on a CPU.
    """
    text = model.text_config
    width, inner, head = text.hidden_size, text.intermediate_size, head_width(text)
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    learns, targets = trained.language_model, trained.lora.targets if trained.lora else ()

    def read(*names: str) -> bool:
        """Whether a layer of these keeps its input."""
        return learns or any(name in targets for name in names)

    norms = 2 * (FLOAT32 + itemsize * learns) * width
    inputs = (read("q_proj", "k_proj", "v_proj") + read("gate_proj", "up_proj")) * width
    attention = 2 * queries + 2 * keys if fused else (4 + read("o_proj")) * queries
    mlp = (3 + read("down_proj")) * inner
    adapters = trained.lora.rank * len(targets) if trained.lora else 0
    return norms + (inputs + attention + mlp + adapters) * itemsize


def decoder_gradients(model: FocusLlavaConfig, itemsize: int) -> int:
    """Bytes of gradients that are alive at once in the backward pass of one layer, of one token: the MLP's."""
    text = model.text_config
    return (2 * text.intermediate_size + text.hidden_size) * itemsize


def tower_layer(model: FocusLlavaConfig, itemsize: int) -> int:
    """Bytes that a layer of the vision tower keeps of one tile."""
    vision = model.vision_config
    outer, inner = int(vision.hidden_size), int(vision.intermediate_size)
    products = 4 if vision.hidden_act == "quick_gelu" else 2  # quick GELU is a product of two
    return (model.patches_per_side**2 + 1) * (8 * outer + products * inner) * itemsize


def encoder(model: FocusLlavaConfig, trained: Trained, work: Workload, itemsize: int, *, checkpointing: bool) -> int:
    """Bytes that vision tower, projector and vision-guided sampler keep of one sample."""
    vision, width = model.vision_config, model.text_config.hidden_size
    patches = model.patches_per_side**2
    kept = 0
    if trained.vision_tower:
        layers = feature_depth(vision.num_hidden_layers, model.vision_feature_layer)
        whole, inputs = tower_layer(model, itemsize), (patches + 1) * int(vision.hidden_size) * itemsize
        kept += work.tiles * (layers * (inputs if checkpointing else whole) + inputs)  # the embeddings' norm too
        kept += work.tiles * 3 * model.tile_px**2 * itemsize * (itemsize < FLOAT32)  # pixels in the weights' dtype
    if trained.projector or trained.vision_tower:
        kept += work.tiles * patches * (int(vision.hidden_size) + 2 * width) * itemsize
    if trained.selector:
        kept += work.map_tokens * SAMPLER_COPIES[model.vision_sampler.probability_gate] * width * itemsize
    return kept


def logits(model: FocusLlavaConfig, trained: Trained, answer_tokens: int, *, itemsize: int = 2) -> int:
    """Most bytes of a chunk's logits: their softmax, its gradient and theirs, in float32. With several chunks the
    head's own gradient, where it learns, adds up beside them."""
    text = model.text_config
    a_row = 3 * FLOAT32 * text.vocab_size
    adds_up = trained.language_model and answer_tokens > CHUNK
    return min(CHUNK, answer_tokens) * a_row + adds_up * text.vocab_size * text.hidden_size * itemsize


def step_memory(
    model: FocusLlavaConfig,
    trained: Trained,
    parameters: Parameters,
    work: Workload,
    *,
    samples: int,
    zero: ZeroStage,
    devices: int,
    checkpointing: bool,
    itemsize: int = 2,
    offload: Literal["none", "optimizer", "all"] = "none",
) -> Memory:
    """All parts, of a micro-batch of `samples`."""
    kept, working = activations(model, trained, work, samples=samples, checkpointing=checkpointing, itemsize=itemsize)
    return Memory(
        **states(parameters, zero=zero, devices=devices, itemsize=itemsize, offload=offload),
        buffers=buffers(parameters, zero=zero, devices=devices, itemsize=itemsize),
        activations=kept,
        working=working,
    )
