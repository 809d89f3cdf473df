"""FocusLLaVA as a model of transformers: encoder and decoder of serving in one graph, for training and evaluation.

    input_ids, pixel_values or TrainedSequence -> packing.py -> decoder layers (attention.py), cut by pruning.py
        -> loss.py, or logits and cache.py for `generate`

Legend: B sequences, C columns of a padded batch, S tokens of a packed row, K branches, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from services.checkpoint.supported import check_decoder
from services.common.errors import InvalidInput
from services.common.settings import require
from services.common.types import ImageTiles, SamplerSettings
from services.encoder.model import EncodedImage, EncoderModel
from services.encoder.vision_tower import feature_depth
from services.modeling import folder as folders
from services.modeling.attention import ATTENTION_NAME, PackedRows
from services.modeling.cache import ShrinkingCache
from services.modeling.config import FocusLlavaModelConfig
from services.modeling.generation import PrunedGeneration
from services.modeling.images import blank, unbatched
from services.modeling.loss import IGNORED, answer_loss_sum
from services.modeling.packing import Conversation, Packed, TrainedSequence, answer_tokens, pack
from services.modeling.pruning import Cut, PruneDraw, stays
from services.sampler.balance import balance_loss_sum
from services.sampler.vision_guided import SelectorLinear


@dataclass
class FocusLlavaOutput(ModelOutput):
    """What `forward` returns."""

    loss: torch.Tensor | None = None
    """float32 scalar, where there are labels."""
    logits: torch.Tensor | None = None
    """[B, C, V]: what follows each column, an image's read to its end; None where there are labels."""
    past_key_values: ShrinkingCache | None = None
    metrics: dict[str, float] | None = None
    """What `training_step` reports, where there are labels."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a micro-batch adds to the counts of its global batch."""

    answer_tokens: int
    branch_counts: torch.Tensor
    """int64 [K], CPU: regions that choose each branch; zeros with the vision-guided sampler off."""
    regions: int


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """A packed row that has been through the decoder."""

    hidden_SD: torch.Tensor
    """What enters the final norm."""
    packed: Packed
    """The tokens that went through the last layer."""
    encoded: list[EncodedImage]
    entered: tuple[int, ...]
    """Tokens of each sequence that entered the first layer."""
    visual: int
    """Visual tokens that entered it."""


class FocusLlavaForConditionalGeneration(PreTrainedModel, PrunedGeneration, GenerationMixin):  # type: ignore[misc]
    """Both stages of a checkpoint and both samplers. A checkpoint's folder is what `from_pretrained` reads and
    `save_pretrained` writes.

    `encoder` and `language_model` have the served stages' parameters under the served names. Whatever is passed in
    moves to the model's device by itself.
    """

    config_class = FocusLlavaModelConfig
    config: FocusLlavaModelConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["CLIPEncoderLayer", "VisionGuidedSampler"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True

    def __init__(self, config: FocusLlavaModelConfig):
        super().__init__(config)
        check_decoder(config.text_config)
        checkpoint = config.checkpoint
        self.encoder = EncoderModel(checkpoint)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config, attn_implementation=ATTENTION_NAME)
        self.freeze_unused()
        self.post_init()
        self._end_answers()

    # The folder.

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, with all its arguments, on the folder of a checkpoint as training and serving have it.

        Raises InvalidInput for a folder of ours that is broken.
        """
        name = pretrained_model_name_or_path
        older = name is not None and folders.is_older(name)
        with folders.with_index(name) if older else contextlib.nullcontext(name) as readable:
            loaded = super().from_pretrained(readable, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.freeze_unused()  # loading puts new parameters in place
        if older:
            model.name_or_path = model.config.name_or_path = os.fspath(name)
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike[str], is_main_process: bool = True,  # type: ignore[override]
                        state_dict: dict[str, torch.Tensor] | None = None, push_to_hub: bool = False,
                        max_shard_size: int | str = "2GB", **kwargs: Any) -> None:  # fmt: skip
        """Writes the folder that serving reads: shards by stage, config.json, and the tokenizer of the folder that the
        model came from, where there is one. Other files in the folder stay.

        An adapter (PEFT) is written as transformers writes it.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub=push_to_hub,
                                    max_shard_size=max_shard_size, **kwargs)  # fmt: skip
            return
        require(not push_to_hub, "push_to_hub", push_to_hub, "False: upload the folder")
        if not is_main_process:
            return
        tensors = self.state_dict() if state_dict is None else state_dict
        self.config.dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        folders.save(save_directory, self.config.saved(), folders.served_names(tensors),
                     source=self.config.name_or_path or None, max_shard_size=max_shard_size)  # fmt: skip

    def freeze_unused(self) -> None:
        """Freezes what no forward pass reaches: an optimizer of ZeRO's would wait for its gradients."""
        tower: Any = self.encoder.vision_tower
        depth = feature_depth(len(tower.encoder.layers), self.config.checkpoint.vision_feature_layer)
        for unused in (tower.post_layernorm, *tower.encoder.layers[depth:]):
            unused.requires_grad_(False)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SelectorLinear):
            init.zeros_(module.weight)
            init.copy_(module.bias, module.first_bias())
        elif isinstance(module, EncoderModel):
            init.normal_(module.image_newline, std=len(module.image_newline) ** -0.5)

    # What transformers looks for.

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def enable_input_require_grads(self) -> None:
        """Makes word embeddings require gradients; not the vision tower's, which may be frozen for its cost."""
        hook = self.get_input_embeddings().register_forward_hook(lambda _module, _args, out: out.requires_grad_(True))
        self._require_grads_hook, self._require_grads_hooks = hook, [hook]

    @property
    def _place(self) -> torch.device:
        """The device that token ids go to."""
        # Named, a weight that ZeRO-3 shards would be gathered, on this rank alone perhaps.
        return next(self.get_input_embeddings().parameters()).device

    # Training.

    def training_step(self, sequences: Sequence[TrainedSequence], *, draw: PruneDraw | None, vision_sampler: bool,
                      answer_tokens: float | torch.Tensor | None = None, branch_counts: torch.Tensor | None = None,
                      regions: float | None = None, balance_weight: float = 0.0
                      ) -> tuple[torch.Tensor, dict[str, float]]:  # fmt: skip
        """The loss of a micro-batch, a float32 scalar, and what to report.

        The loss is the sum over answer tokens, over `answer_tokens`, and `balance_weight` times the balance loss with
        the share of each branch from `branch_counts` [K] and `regions`. These three are of the global batch; left out,
        they are this micro-batch's own. The losses of its micro-batches then sum up to the global batch's.

        draw: where and how far text-guided pruning goes; None leaves it out.
        vision_sampler: whether the vision-guided sampler is on; where it is off, its parameters get zero gradients.

        Raises InvalidInput for sequences whose images do not fit their tokens, or a layer that there is not.
        """
        cut = Cut.of(draw) if draw else None
        return self._loss(sequences, cut, vision_sampler, answer_tokens, branch_counts, regions, balance_weight)

    def _loss(self, sequences: Sequence[TrainedSequence], cut: Cut | None, vision_sampler: bool,
              answer_tokens: float | torch.Tensor | None = None, branch_counts: torch.Tensor | None = None,
              regions: float | None = None, balance_weight: float = 0.0
              ) -> tuple[torch.Tensor, dict[str, float]]:  # fmt: skip
        """What `training_step` returns."""
        done = self._run(sequences, vision_sampler=vision_sampler, cut=cut)
        target_S = done.packed.target_S()
        rows = (target_S != IGNORED).nonzero()[:, 0]
        head: Any = self.language_model.lm_head
        # One row where there is none: what a head is called for must not differ by rank.
        normed_ND = self.language_model.model.norm(done.hidden_SD[rows if len(rows) else slice(1)])
        loss_sum, tokens = answer_loss_sum(normed_ND, target_S[rows if len(rows) else slice(1)], head)
        loss = loss_sum / (max(tokens, 1) if answer_tokens is None else answer_tokens)
        kept = int(done.packed.visual_S.sum())
        metrics = {
            "answer_loss": loss_sum.item() / max(tokens, 1),
            "answer_tokens": float(tokens),
            "text_tokens": float(sum(done.entered) - done.visual),
            "visual_tokens": float(done.visual),
            "kept_tokens": float(kept),
        }
        if cut is not None:
            metrics["prune_layer"] = float(cut.layer)
        images = done.encoded[: sum(len(sequence.images) for sequence in sequences)]
        metrics["uncompressed_tokens"] = float(sum(image.uncompressed_tokens for image in images))
        probs = [image.sampled.probs_MK for image in images if image.sampled]
        if probs:
            probs_MK, ids_M = torch.cat(probs), torch.cat([i.sampled.branch_ids_M for i in images if i.sampled])
            own_K = torch.bincount(ids_M, minlength=probs_MK.shape[1])
            counts_K = own_K if branch_counts is None else branch_counts.to(probs_MK.device)
            total = len(ids_M) if regions is None else regions
            coefficients = self.config.checkpoint.vision_sampler.balance_coefficients
            balance = balance_loss_sum(probs_MK, counts_K, total, coefficients)
            if balance_weight:
                loss = loss + balance_weight * balance
            metrics |= {"balance_loss": balance.item(), "regions": float(len(ids_M))}
            metrics |= {f"branch_{k}": float(count) for k, count in enumerate(own_K.tolist())}
        return loss + self._zero(done.encoded, vision_sampler), metrics

    @torch.no_grad()
    def count(self, sequences: Sequence[TrainedSequence], *, vision_sampler: bool = True) -> Counts:
        """What `training_step` is given, summed up over a global batch. It runs the encoder where the sampler is on."""
        branches = len(self.config.checkpoint.vision_sampler.branches)
        counts_K, regions = torch.zeros(branches, dtype=torch.int64, device="cpu"), 0
        images = [image for sequence in sequences for image in sequence.images]
        if vision_sampler:
            for image in self._encode(images, True)[: len(images)]:
                if image.sampled:
                    counts_K += torch.bincount(image.sampled.branch_ids_M, minlength=branches).cpu()
                    regions += len(image.sampled.branch_ids_M)
        return Counts(answer_tokens=answer_tokens(sequences), branch_counts=counts_K, regions=regions)

    def _zero(self, encoded: Sequence[EncodedImage], vision_sampler: bool) -> torch.Tensor:
        """Nothing, with a graph to all that trains and that this micro-batch may not have reached."""
        # ZeRO waits for every parameter's gradient, on every rank.
        total = torch.zeros((), device=self._place)
        for image in encoded:
            total = total + 0.0 * image.tokens_ND.float().sum()
            if image.sampled:
                total = total + 0.0 * image.sampled.probs_MK.sum()
        if not vision_sampler:
            sampler = self.encoder.vision_guided_sampler
            total = total + 0.0 * sum(p.float().sum() for p in sampler.parameters() if p.requires_grad)
        return total

    # One pass.

    def _run(self, sequences: Sequence[TrainedSequence], *, vision_sampler: bool, cut: Cut | None,
             cache: ShrinkingCache | None = None) -> _Pass:  # fmt: skip
        """Sequences through encoder and decoder in one packed row; a cache takes their keys and values."""
        require(bool(sequences), "sequences", sequences, "one or more")
        decoder: Any = self.language_model.model
        attention = self.language_model.config._attn_implementation
        require(attention == ATTENTION_NAME, "attn_implementation", attention, f"{ATTENTION_NAME}, the only one here")
        layers = len(decoder.layers)
        if cut is not None:
            require(cut.layer < layers, "draw.layer", cut.layer, f"1..{layers - 1}")
        images = [image for sequence in sequences for image in sequence.images]
        encoded = self._encode(images, vision_sampler)
        counts = [len(image.tokens_ND) for image in encoded[: len(images)]]
        packed = pack(sequences, counts, image_token_id=self.config.image_token_id, device=self._place)
        entered, visual = packed.lengths, int(packed.visual_S.sum())
        hidden_SD = decoder.embed_tokens(packed.ids_S)
        if images:
            tokens_ND = torch.cat([image.tokens_ND for image in encoded]).to(hidden_SD)
            hidden_SD = hidden_SD.index_copy(0, packed.visual_S.nonzero()[:, 0], tokens_ND)
        hidden_1SD, rows = hidden_SD[None], PackedRows(packed.lengths, cache)
        rotary = decoder.rotary_emb(hidden_1SD, packed.position_S[None])
        for index, layer in enumerate(decoder.layers):
            if cut is not None and index == cut.layer:
                stays_S = stays(layer, hidden_1SD[0].detach(), rotary[0][0], rotary[1][0], packed, cut.settings)
                hidden_1SD, rotary = hidden_1SD[:, stays_S], tuple(table[:, stays_S] for table in rotary)
                packed = packed.select(stays_S)
                rows = PackedRows(packed.lengths, cache)
            hidden_1SD = layer(hidden_1SD, attention_mask=None, position_embeddings=rotary, focus_rows=rows)
        return _Pass(hidden_SD=hidden_1SD[0], packed=packed, encoded=encoded, entered=entered, visual=visual)

    def _encode(self, images: Sequence[ImageTiles], vision_sampler: bool) -> list[EncodedImage]:
        """Visual tokens of each image. Where there is none, those of a blank one, if other ranks count on the encoder:
        on its gradients, or under ZeRO-3 on its part in gathering weights."""
        parameters = list(self.encoder.parameters())
        sharded = hasattr(parameters[0], "ds_id")
        if not images:
            if not sharded and not (torch.is_grad_enabled() and any(p.requires_grad for p in parameters)):
                return []
            images = [blank(self.config.checkpoint, self._place)]
        if not sharded or not vision_sampler:
            return self.encoder(images, [vision_sampler] * len(images))
        # Ranks differ in their images, and may not in how often they call the selector's layer.
        maps = self.encoder.project(images)
        logits = self.encoder.vision_guided_sampler.logits_of([(each.map_HWD, each.base_PD) for each in maps])
        return [self.encoder.tokens(each, True, logits_MK=own) for each, own in zip(maps, logits, strict=True)]

    # transformers' own way in.

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None,
                pixel_values: torch.Tensor | None = None, image_sizes: torch.Tensor | None = None,
                instruction_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None,
                past_key_values: ShrinkingCache | None = None, use_cache: bool | None = None,
                logits_to_keep: int = 0, num_items_in_batch: float | torch.Tensor | None = None,
                vision_sampler: bool | None = None, text_sampler: bool | None = None, threshold: float | None = None,
                keep_ratio: float | None = None, draw: PruneDraw | None = None, balance_weight: float = 0.0,
                return_dict: bool | None = None, **_: Any) -> FocusLlavaOutput:  # fmt: skip
        """A padded batch [B, C] as `FocusLlavaProcessor` makes it: one image token an image, padded on any side.

        pixel_values, image_sizes: of all images in order, see `services.modeling.images`.
        instruction_mask: bool [B, C], the tokens whose attention chooses visual tokens; without it none is pruned.
        labels: int64 [B, C], aligned with input_ids, -100 where there is no loss; with them comes a loss and no logits.
            With `num_items_in_batch` the loss is the sum over that many tokens, as Trainer asks for.
        past_key_values: what an earlier call with `use_cache` returned; input_ids are then new tokens.
        logits_to_keep: so many last columns have logits; 0 is all.
        vision_sampler, text_sampler, threshold, keep_ratio: both samplers; None is as the checkpoint has it.
        draw: pruning by a draw of training, in place of the checkpoint's layer and threshold.
        balance_weight: of the balance loss, over this batch alone.

        Raises InvalidInput naming the argument.
        """
        if past_key_values is not None:
            if not isinstance(past_key_values, ShrinkingCache):
                found = f"is a {type(past_key_values).__name__}, expected the cache that this model made"
                raise InvalidInput(found, field="past_key_values")
            return FocusLlavaOutput(
                logits=self._continued(input_ids, past_key_values, logits_to_keep), past_key_values=past_key_values
            )
        real_BC = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        real_BC = real_BC.to(input_ids.device).bool()
        sequences = self._conversations(input_ids, real_BC, pixel_values, image_sizes, instruction_mask, labels)
        sampled = self.config.checkpoint.vision_sampler.enabled and vision_sampler is not False
        cut = Cut.of(draw) if draw else self._cut(len(sequences), text_sampler, threshold, keep_ratio)
        if labels is not None:
            loss, metrics = self._loss(sequences, cut, sampled, num_items_in_batch, balance_weight=balance_weight)
            return FocusLlavaOutput(loss=loss, metrics=metrics)
        cache = ShrinkingCache(self.config.text_config) if use_cache else None
        done = self._run(sequences, vision_sampler=sampled, cut=cut, cache=cache)
        if cache is not None:
            cache.begin(columns=input_ids.shape[1], lower=done.entered, upper=done.packed.lengths,
                        prune_layer=cut.layer if cut else len(cache.layers), device=self._place)  # fmt: skip
        logits = self._aligned_logits(done, real_BC, logits_to_keep)
        return FocusLlavaOutput(logits=logits, past_key_values=cache)

    def _conversations(self, input_ids: torch.Tensor, real_BC: torch.Tensor, pixel_values: torch.Tensor | None,
                       image_sizes: torch.Tensor | None, instruction_mask: torch.Tensor | None,
                       labels: torch.Tensor | None) -> list[Conversation]:  # fmt: skip
        images: list[ImageTiles] = []
        if pixel_values is not None:
            require(image_sizes is not None, "image_sizes", image_sizes, "a tensor beside pixel_values")
            images = unbatched(pixel_values, image_sizes, self.config.checkpoint)  # type: ignore[arg-type]
        marked = torch.zeros_like(real_BC) if instruction_mask is None else instruction_mask.to(real_BC.device).bool()
        labelled = torch.full_like(input_ids, IGNORED) if labels is None else labels.to(input_ids.device)
        sequences, start = [], 0
        for row, real_C in enumerate(real_BC):
            ids = input_ids[row][real_C]
            require(len(ids) > 0, "attention_mask", "all zero in a row", "one token or more")
            stop = start + int((ids == self.config.image_token_id).sum())
            own = tuple(images[start:stop])
            sequences.append(
                Conversation(input_ids=ids, labels=labelled[row][real_C], instruction=marked[row][real_C], images=own)
            )
            start = stop
        if start != len(images):
            raise InvalidInput(f"has {start} image tokens for {len(images)} images", field="input_ids")
        return sequences

    def _cut(self, sequences: int, text_sampler: bool | None, threshold: float | None,
             keep_ratio: float | None) -> Cut | None:  # fmt: skip
        """Text-guided pruning as the checkpoint has it, but for what was asked."""
        ours = self.config.checkpoint.text_sampler
        if not ours.enabled or text_sampler is False:
            return None
        if threshold is None and keep_ratio is None:
            threshold = ours.threshold
        setting = SamplerSettings(threshold=threshold, keep_ratio=keep_ratio)
        return Cut(layer=ours.layer, settings=(setting,) * sequences)

    def _aligned_logits(self, done: _Pass, real_BC: torch.Tensor, logits_to_keep: int) -> torch.Tensor:
        """[B, C', V] for the last columns; zeros at padding.

        A column's logits are those of the last token that went on at it or before it.
        """
        device, (batch, columns) = self._place, real_BC.shape
        real_BC = real_BC.to(device)
        token_BC = (real_BC.flatten().cumsum(0) - 1).view(batch, columns)
        first = columns - logits_to_keep if logits_to_keep else 0
        wanted_BC = real_BC[:, first:]
        token_R = token_BC[:, first:][wanted_BC]
        row_R = (torch.searchsorted(done.packed.source_S, token_R, right=True) - 1).clamp_min(0)
        lm: Any = self.language_model
        logits_RV = lm.lm_head(lm.model.norm(done.hidden_SD[row_R]))
        logits = logits_RV.new_zeros(batch, columns - first, logits_RV.shape[-1])
        logits[wanted_BC] = logits_RV
        return logits

    def _continued(self, input_ids: torch.Tensor, cache: ShrinkingCache, logits_to_keep: int) -> torch.Tensor:
        """Logits of new tokens after what the cache holds."""
        decoder: Any = self.language_model.model
        hidden_BTD = decoder.embed_tokens(input_ids.to(self._place))
        rotary = decoder.rotary_emb(hidden_BTD, cache.grow(input_ids.shape[1]))
        for layer in decoder.layers:
            hidden_BTD = layer(hidden_BTD, attention_mask=None, position_embeddings=rotary, focus_rows=cache)
        hidden_BTD = hidden_BTD[:, -logits_to_keep:] if logits_to_keep else hidden_BTD
        head: Any = self.language_model.lm_head
        return head(decoder.norm(hidden_BTD))
