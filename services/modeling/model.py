"""FocusLLaVA as a model of transformers: encoder and decoder of serving in one graph, for training and evaluation.

    TrainedSequence -> packing.py -> decoder layers (attention.py), cut by pruning.py -> loss.py
    padded batch -> padded.py -> the same -> logits, and cache.py for `generate`

Legend: S tokens of a packed row, B conversations, or branches of sequences that have them, R answer tokens, M regions,
K branches of a region, D width.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin
from transformers import initialization as init

from services.checkpoint.supported import check_decoder
from services.common.settings import require
from services.common.types import ImageTiles
from services.encoder.model import EncodedImage, EncoderModel
from services.encoder.vision_tower import feature_depth
from services.modeling import folder as folders
from services.modeling.attention import ATTENTION_NAME, PackedRows
from services.modeling.cache import ShrinkingCache
from services.modeling.config import FocusLlavaModelConfig
from services.modeling.generation import PrunedGeneration
from services.modeling.images import blank
from services.modeling.loss import IGNORED, answer_loss_sum
from services.modeling.outputs import Counts, Pass
from services.modeling.packing import TrainedSequence, answers_in, pack
from services.modeling.padded import PaddedBatches
from services.modeling.pruning import Cut, kept_rows
from services.sampler.balance import balance_loss, chosen_branches
from services.sampler.vision_guided import SampledMap, SelectorLinear


class FocusLlavaForConditionalGeneration(  # type: ignore[misc]
    PaddedBatches, PrunedGeneration, GenerationMixin
):
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
        self._draws = random.Random(0)
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
                        state_dict: folders.Tensors | None = None, push_to_hub: bool = False,
                        max_shard_size: int | str = "2GB", **kwargs: Any) -> None:  # fmt: skip
        """Writes the folder that serving reads: shards by stage, config.json, and the tokenizer of the folder that the
        model came from, where there is one. Other files in the folder stay.

        state_dict: tensors by the model's names; pairs of name and tensor are read one at a time and once.
        An adapter (PEFT) is written as transformers writes it.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            whole = None if state_dict is None else dict(state_dict)
            super().save_pretrained(save_directory, is_main_process, whole, push_to_hub=push_to_hub,
                                    max_shard_size=max_shard_size, **kwargs)  # fmt: skip
            return
        require(not push_to_hub, "push_to_hub", push_to_hub, "False: upload the folder")
        if not is_main_process:
            return
        tensors = folders.served_names(self.state_dict() if state_dict is None else state_dict)
        name, tensor = next(tensors)
        self.config.dtype = str(tensor.dtype).removeprefix("torch.")
        folders.save(save_directory, self.config.saved(), itertools.chain([(name, tensor)], tensors),
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

    # Training.

    def training_step(self, sequences: Sequence[TrainedSequence], *, draw: Cut | None, vision_sampler: bool,
                      answer_tokens: float | torch.Tensor | None = None, branch_counts: torch.Tensor | None = None,
                      regions: float | None = None, balance_weight: float = 0.0,
                      encoded: Sequence[EncodedImage] | None = None
                      ) -> tuple[torch.Tensor, dict[str, float]]:  # fmt: skip
        """The loss of a micro-batch, a float32 scalar, and what to report.

        The loss is the sum over answer tokens, over `answer_tokens`, and `balance_weight` times the balance loss with
        the share of each branch from `branch_counts` [K] and `regions`. These three are of the global batch; left out,
        they are this micro-batch's own. The losses of its micro-batches then sum up to the global batch's.

        draw: where and how far text-guided pruning goes (a `PruneDraw`), or another rule; None leaves it out.
        vision_sampler: whether the vision-guided sampler is on; where it is off, its parameters get zero gradients.
        encoded: the visual tokens of all images in order, where the caller has them in another way than `encode`.

        Raises InvalidInput for sequences whose images do not fit their tokens, or a layer that there is not.
        """
        done = self.run(sequences, vision_sampler=vision_sampler, cut=draw, encoded=encoded)
        loss_sum, exact_B = self.answers(done)
        tokens = answers_in(sequences)
        loss = loss_sum / (max(tokens, 1) if answer_tokens is None else answer_tokens)
        metrics = {
            "answer_loss": loss_sum.item() / max(tokens, 1),
            "answer_tokens": float(tokens),
            "text_tokens": float(sum(each.whole for each in done.entered) - done.visual),
            "visual_tokens": float(done.visual),
            "kept_tokens": float(done.packed.visual_S.sum()),
        }
        if len(exact_B):
            metrics["exact"] = exact_B.float().mean().item()
        if draw is not None:
            metrics |= {"prune_layer": float(draw.layers[0]), **_kept_shares(done.seen)}
        images = done.encoded[: sum(len(sequence.images) for sequence in sequences)]
        metrics["uncompressed_tokens"] = float(sum(image.uncompressed_tokens for image in images))
        sampled = [image.sampled for image in images if image.sampled]
        if sampled:
            balance, of_regions = self._balance(sampled, branch_counts, regions)
            loss = loss + balance_weight * balance if balance_weight else loss
            metrics |= of_regions
        return loss + self._zero(done.encoded, vision_sampler), metrics

    def _balance(self, sampled: Sequence[SampledMap], branch_counts: torch.Tensor | None, regions: float | None
                 ) -> tuple[torch.Tensor, dict[str, float]]:  # fmt: skip
        """The balance loss of a micro-batch's maps, and what to report of their regions."""
        probs_MK = torch.cat([each.probs_MK for each in sampled])
        ids_M = torch.cat([each.branch_ids_M for each in sampled])
        coefficients = self.config.checkpoint.vision_sampler.balance_coefficients
        balance = balance_loss(probs_MK, coefficients, counts_K=branch_counts, regions=regions)
        used_K = torch.bincount(ids_M, minlength=probs_MK.shape[1]).tolist()
        metrics = {"balance_loss": balance.item(), "regions": float(len(ids_M))}
        return balance, {**metrics, **{f"branch_{k}": float(count) for k, count in enumerate(used_K)}}

    @torch.no_grad()
    def count(self, sequences: Sequence[TrainedSequence], *, vision_sampler: bool = True,
              encoded: Sequence[EncodedImage] | None = None) -> Counts:  # fmt: skip
        """What `training_step` is given, summed up over a global batch. It runs the encoder where the sampler is on and
        `encoded` does not have what it gives."""
        counts_K = torch.zeros(len(self.config.checkpoint.vision_sampler.branches), dtype=torch.int64, device="cpu")
        images = [image for sequence in sequences for image in sequence.images]
        if vision_sampler:
            encoded = self.encode(images, True) if encoded is None else encoded
            for image in encoded[: len(images)]:
                if image.sampled:
                    counts_K += chosen_branches(image.sampled.probs_MK).cpu()
        return Counts(answer_tokens=answers_in(sequences), branch_counts=counts_K, regions=int(counts_K.sum()))

    def answers(self, done: Pass) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed cross-entropy of the answers' tokens, a float32 scalar; and bool [B], of each conversation or
        branch with an answer, whether all of its tokens are the likeliest: what greedy decoding would say."""
        target_S = done.packed.target_S()
        rows = (target_S != IGNORED).nonzero()[:, 0]
        head: Any = self.language_model.lm_head
        # One row where there is none: what a head is called for must not differ by rank.
        some = rows if len(rows) else slice(1)
        loss_sum, right_R = answer_loss_sum(self.language_model.model.norm(done.hidden_SD[some]), target_S[some], head)
        branch_R, wrong_B = done.packed.branch_S()[rows], right_R.new_zeros(done.packed.branches, dtype=torch.float32)
        wrong_B = wrong_B.index_add(0, branch_R, (~right_R).float())
        return loss_sum, wrong_B[branch_R.unique()] == 0

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

    def run(self, sequences: Sequence[TrainedSequence], *, vision_sampler: bool, cut: Cut | None,
            encoded: Sequence[EncodedImage] | None = None, cache: ShrinkingCache | None = None) -> Pass:  # fmt: skip
        """Sequences through encoder and decoder in one packed row; a cache takes their keys and values.

        encoded: as `training_step` takes it.
        """
        require(bool(sequences), "sequences", sequences, "one or more")
        decoder: Any = self.language_model.model
        attention = self.language_model.config._attn_implementation
        require(attention == ATTENTION_NAME, "attn_implementation", attention, f"{ATTENTION_NAME}, the only one here")
        layers = len(decoder.layers)
        if cut is not None:
            require(cut.layers[-1] < layers, "draw.layer", cut.layers[-1], f"1..{layers - 1}")
        images = [image for sequence in sequences for image in sequence.images]
        encoded = self.encode(images, vision_sampler) if encoded is None else list(encoded)
        tokens = [image.tokens_ND for image in encoded[: len(images)]]
        packed = pack(sequences, [*map(len, tokens)], image_token_id=self.config.image_token_id, device=self._place)
        entered, visual = packed.lengths, int(packed.visual_S.sum())
        hidden_SD = decoder.embed_tokens(packed.ids_S)
        if images:
            hidden_SD = hidden_SD.index_copy(0, packed.visual_S.nonzero()[:, 0], torch.cat(tokens).to(hidden_SD))
        hidden_1SD, rows = hidden_SD[None], PackedRows(packed.lengths, cache)
        rotary = decoder.rotary_emb(hidden_1SD, packed.position_S[None])
        first = present = packed.visual_counts()
        seen: list[list[int]] = []
        for index, layer in enumerate(decoder.layers):
            if cut is not None and index in cut.layers:
                going = kept_rows(index, layer, hidden_1SD[0].detach(), rotary[0][0], rotary[1][0], packed, cut, first)
                hidden_1SD, *rotary = (x.index_select(1, torch.cat(going)) for x in (hidden_1SD, *rotary))
                packed = packed.take(going)
                rows, present = PackedRows(packed.lengths, cache), packed.visual_counts()
            seen.append(present)
            hidden_1SD = layer(hidden_1SD, attention_mask=None, position_embeddings=tuple(rotary), focus_rows=rows)
        return Pass(hidden_SD=hidden_1SD[0], packed=packed, encoded=encoded, entered=entered, visual=visual, seen=seen)

    def encode(self, images: Sequence[ImageTiles], vision_sampler: bool) -> list[EncodedImage]:
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


def _kept_shares(seen: Sequence[Sequence[int]]) -> dict[str, float]:
    """The mean share of its visual tokens that a conversation or branch goes on with, and the share in each layer."""
    pairs = [(first, last) for first, last in zip(seen[0], seen[-1], strict=True) if first]
    if not pairs:
        return {}
    shares = {f"kept_layer_{index}": sum(of_layer) / sum(seen[0]) for index, of_layer in enumerate(seen)}
    return {"kept_share": sum(last / first for first, last in pairs) / len(pairs), **shares}
