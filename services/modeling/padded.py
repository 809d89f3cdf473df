"""transformers' own way into the model: padded batches, logits by column, and the cache that `generate` hands back.

Legend: B sequences, C columns of a padded batch, R wanted columns, T new tokens, D width, V vocabulary.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from services.common.errors import InvalidInput
from services.common.settings import require
from services.common.types import ImageTiles
from services.modeling.cache import ShrinkingCache
from services.modeling.images import unbatched
from services.modeling.lookups import Lookups
from services.modeling.loss import IGNORED
from services.modeling.outputs import FocusLlavaOutput, Pass
from services.modeling.packing import TrainedSequence
from services.modeling.pruning import Cut, PruneDraw, PruneSchedule


class PaddedBatches(Lookups):
    """`forward` of a model that runs packed rows."""

    config: Any
    run: Any
    training_step: Any
    _draws: random.Random

    prune_schedule: PruneSchedule | None = None
    """How `forward` prunes in train mode where there are labels: by a draw of its own each time, as Sec. 3.4 trains.
    What is drawn depends on the number of calls alone: it is that of every rank. None is as the checkpoint has it.
    """

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None,
                pixel_values: torch.Tensor | None = None, image_sizes: torch.Tensor | None = None,
                instruction_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None,
                past_key_values: ShrinkingCache | None = None, use_cache: bool | None = None,
                logits_to_keep: int = 0, num_items_in_batch: float | torch.Tensor | None = None,
                vision_sampler: bool | None = None, text_sampler: bool | None = None, threshold: float | None = None,
                keep_ratio: float | None = None, draw: Cut | None = None, balance_weight: float = 0.0,
                return_dict: bool | None = None, **_: Any) -> FocusLlavaOutput:  # fmt: skip
        """A padded batch [B, C] as `FocusLlavaProcessor` makes it: one image token an image, padded on any side.

        pixel_values, image_sizes: of all images in order, see `services.modeling.images`.
        instruction_mask: bool [B, C], the tokens whose attention chooses visual tokens; without it none is pruned.
        labels: int64 [B, C], aligned with input_ids, -100 where there is no loss; with them comes a loss and no logits.
            With `num_items_in_batch` the loss is the sum over that many tokens, as Trainer asks for.
        past_key_values: what an earlier call with `use_cache` returned; input_ids are then new tokens.
        logits_to_keep: so many last columns have logits; 0 is all.
        vision_sampler, text_sampler, threshold, keep_ratio: both samplers; None is as the checkpoint has it.
        draw: pruning by a draw of training, in place of `prune_schedule` and the checkpoint's layer and threshold.
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
        if draw is None and text_sampler is not False:
            drawn = self.prune_schedule if self.training and labels is not None else None
            draw = (
                drawn.draw(self._draws, len(sequences))
                if drawn
                else self._served(len(sequences), threshold, keep_ratio)
            )
        if labels is not None:
            loss, metrics = self.training_step(
                sequences,
                draw=draw,
                vision_sampler=sampled,
                answer_tokens=num_items_in_batch,
                balance_weight=balance_weight,
            )
            return FocusLlavaOutput(loss=loss, metrics=metrics)
        cache = ShrinkingCache(self.config.text_config) if use_cache else None
        done = self.run(sequences, vision_sampler=sampled, cut=draw, cache=cache)
        if cache is not None:
            lower, upper = ([each.whole for each in lengths] for lengths in (done.entered, done.packed.lengths))
            cache.begin(columns=input_ids.shape[1], lower=lower, upper=upper, device=self._place,
                        prune_layer=draw.layers[0] if draw else len(cache.layers))  # fmt: skip
        logits = self._aligned_logits(done, real_BC, logits_to_keep)
        return FocusLlavaOutput(logits=logits, past_key_values=cache)

    def _conversations(self, input_ids: torch.Tensor, real_BC: torch.Tensor, pixel_values: torch.Tensor | None,
                       image_sizes: torch.Tensor | None, instruction_mask: torch.Tensor | None,
                       labels: torch.Tensor | None) -> list[TrainedSequence]:  # fmt: skip
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
                TrainedSequence(
                    input_ids=ids, labels=labelled[row][real_C], instruction=marked[row][real_C], images=own
                )
            )
            start = stop
        if start != len(images):
            raise InvalidInput(f"has {start} image tokens for {len(images)} images", field="input_ids")
        return sequences

    def _served(self, sequences: int, threshold: float | None, keep_ratio: float | None) -> PruneDraw | None:
        """Text-guided pruning as the checkpoint has it, but for what was asked."""
        ours = self.config.checkpoint.text_sampler
        if not ours.enabled:
            return None
        gamma = ours.threshold if threshold is None else threshold
        return PruneDraw(layer=ours.layer, thresholds=(gamma,) * sequences, keep_ratio=keep_ratio)

    def _aligned_logits(self, done: Pass, real_BC: torch.Tensor, logits_to_keep: int) -> torch.Tensor:
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
