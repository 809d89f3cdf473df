"""The joint model: encoder and language model in one graph, with both samplers as training sees them (Sec. 3.4)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from services.checkpoint.config import FocusLlavaConfig
from services.common.errors import InvalidInput
from services.common.settings import Amount, Natural, Share
from services.encoder.model import EncodedImage, EncoderModel
from services.sampler.balance import balance_loss, balance_loss_sum
from services.sampler.calibration import finer_for_share
from training.global_batch import Totals, to_device
from training.hooks import AttentionLossHook, BranchHook, LayerHook, MapHook
from training.layout import ATTENTION_NAME, Sample, TextBatch, attention_mask, pack_text, positions
from training.stochastic_prune import PruneSchedule, decide, gather_index, stage_index


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    balance: Amount = 0.1
    """alpha of Eq. 3."""
    balance_warmup: Natural = 0
    """Steps in which alpha rises from 0 to `balance`: regions that need their detail are told from the others first."""

    def balance_at(self, step: int) -> float:
        """The weight of the balance loss in a step, counted from 0."""
        return self.balance * min(1.0, (step + 1) / max(1, self.balance_warmup))


@dataclass(frozen=True, kw_only=True)
class HeldShare:
    """The share of the feature map that the selector leaves, held by moving all its logits alike, batch by batch.

    The balance loss, which asks for shares until then, then has no weight: what is left to learn is which regions need
    the detail. Without it a selector drifts once the questions are learned, each seed its own way.
    """

    share: Share
    """The share of a batch's maps to leave, 0 to 1; what is left is as near to it as can be, and never above."""
    after: Natural = 0
    """Steps before the share is held."""
    falls_from: Natural | None = None
    """The step from which the share held falls evenly, from the whole map, to reach it after `after` steps; None
    jumps to it. At its start a selector cannot tell regions apart, so none could be chosen: give it ten steps."""

    def __post_init__(self) -> None:
        if self.falls_from is not None and not self.falls_from < self.after:
            raise InvalidInput(f"is {self.falls_from}, expected a step before after, {self.after}", field="falls_from")

    def at(self, step: int) -> float | None:
        """The share of a step, None where it is the selector's own."""
        if step >= self.after:
            return self.share
        if self.falls_from is None or step < self.falls_from:
            return None
        return 1 - (1 - self.share) * (step - self.falls_from) / (self.after - self.falls_from)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What the model would answer, by teacher forcing, and the visual tokens that it took."""

    encoded: list[EncodedImage]
    exact_BQ: torch.Tensor
    """bool: every token of the branch's answer, its end included, is the likeliest: what greedy decoding would say."""
    tokens_BQL: torch.Tensor
    """int64: visual tokens that each decoder layer sees; their mean is Sec. 4.4's converted count."""


class JointModel(nn.Module):
    """forward gives the loss and what to print. `schedule` None turns text-guided pruning off.

    Where `map_rival`, `layer_rival`, `branch_control` and `grounding` stand, `training.hooks` says.
    """

    def __init__(self, config: FocusLlavaConfig, *, weights: LossWeights, schedule: PruneSchedule | None,
                 vision_sampler: bool, pad_id: int, seed: int = 0, selector_steps: int = 0,
                 encoder_steps: int = 0, map_rival: MapHook | None = None, layer_rival: LayerHook | None = None,
                 branch_control: BranchHook | None = None, grounding: AttentionLossHook | None = None,
                 hold: HeldShare | None = None):  # fmt: skip
        super().__init__()
        self.config, self.weights, self.schedule = config, weights, schedule
        self.map_rival, self.layer_rival = map_rival, layer_rival
        self.branch_control, self.grounding = branch_control, grounding
        self.vision_sampler, self.pad_id, self.seed = vision_sampler, pad_id, seed
        self.selector_steps, self.encoder_steps, self.hold = selector_steps, encoder_steps, hold
        self.encoder = EncoderModel(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config, attn_implementation=ATTENTION_NAME)
        # Parameters that no forward pass reaches would make the optimizer wait for their gradients.
        self.encoder.vision_tower.post_layernorm.requires_grad_(False)
        self.selects = vision_sampler and (branch_control is None or branch_control.selects)
        if not self.selects:
            self.encoder.vision_guided_sampler.requires_grad_(False)

    def forward(self, batch: tuple[int, Sequence[Sample]], step: int, totals: Totals | None = None
                ) -> tuple[torch.Tensor, dict[str, float]]:  # fmt: skip
        """batch: the micro-batch's place in its global batch, and samples. What is drawn depends on seed, step and
        place alone: one layer a step, the threshold of a pair as one large micro-batch would draw it.

        totals: the sums of `count` over the global batch; None where this micro-batch is the whole of it.
        """
        place, samples = batch
        rng = random.Random(f"{self.seed}/{step}/0")
        encoder_rests = 0 < self.encoder_steps <= step
        with torch.set_grad_enabled(torch.is_grad_enabled() and not encoder_rests):
            share = self.hold.at(step) if self.hold else None
            encoded = self.encode(samples, self._branch_draws(step, place), share=share)
        text = to_device(pack_text(samples, self.pad_id), self._device)
        # Only the unsampled map has its tokens where evidence can be looked up.
        evidence = self.grounding.evidence(samples, encoded) if self.grounding else None
        hidden_BQTD, extra = self._run(encoded, text, evidence, rng, place)
        loss, metrics = self._language_loss(hidden_BQTD, text, totals)
        if self.grounding:
            loss = loss + self.grounding.weight * extra["grounding"]
            metrics["grounding"] = extra["grounding"].item()
        if self.vision_sampler:
            probs = torch.cat([e.sampled.probs_MK for e in encoded if e.sampled])
            coefficients = self.config.vision_sampler.balance_coefficients
            alpha = self._balance_weight(step)
            if totals is not None and alpha:
                counts_K = totals.counts[1:].to(probs.device)
                balance = balance_loss_sum(probs, counts_K, counts_K.sum().item(), coefficients) * totals.micro_batches
            else:
                balance = balance_loss(probs, coefficients)
            if self.selects:
                # A selector at rest could only be pleased by the features: no loss of its own, zero gradients for ZeRO.
                loss = loss + alpha * balance
            metrics["balance"] = balance.item()
            ids = torch.cat([e.sampled.branch_ids_M for e in encoded if e.sampled])
            used = torch.bincount(ids, minlength=probs.shape[1]).float() / len(ids)
            metrics |= {f"branch_{k}": float(share) for k, share in enumerate(used)}
        if encoder_rests:
            # ZeRO waits for every parameter's gradient.
            loss = loss + 0.0 * sum(p.sum() for p in self.encoder.parameters() if p.requires_grad)
        full = sum(e.uncompressed_tokens for e in encoded)
        metrics["visual_tokens"] = visual = float(sum(len(e.tokens_ND) for e in encoded))
        words = (len(s.prefix_ids) + sum(len(b.token_ids) for b in s.branches) for s in samples)
        metrics["text_tokens"] = float(sum(words))
        metrics["sampled_share"] = visual / full
        if "kept_share" in extra:
            metrics["kept_share"] = extra["kept_share"].item()
            by_layer = extra["visual_tokens_LR"].sum(1) / extra["visual_tokens_LR"][0].sum()
            metrics |= {f"kept_layer_{index}": share for index, share in enumerate(by_layer.tolist())}
        return loss, metrics

    @torch.no_grad()
    def count(self, batch: tuple[int, Sequence[Sample]], step: int) -> torch.Tensor:
        """float64 [1 + K]: answer tokens, and the regions that choose each branch where the balance loss has a weight.

        The selector is asked before the step for it: F of Eq. 3 is of the global batch.
        """
        place, samples = batch
        answers = sum(label != -100 for sample in samples for branch in sample.branches for label in branch.labels[1:])
        counts = torch.zeros(1 + len(self.config.vision_sampler.branches), dtype=torch.float64, device="cpu")
        counts[0] = answers
        if self._balance_weight(step):
            encoded = self.encode(samples, self._branch_draws(step, place))
            for image in encoded:
                if image.sampled:
                    likeliest_M = image.sampled.probs_MK.argmax(1)
                    counts[1:] += torch.bincount(likeliest_M, minlength=len(counts) - 1).cpu()
        return counts

    @property
    def _device(self) -> torch.device:
        return self.encoder.image_newline.device

    def _branch_draws(self, step: int, place: int) -> random.Random:
        return random.Random(f"{self.seed}/{step}/{place}/branches")

    def _balance_weight(self, step: int) -> float:
        """The weight of the balance loss in a step; none where the selector rests, is held or is not asked."""
        rests = any(0 < steps <= step for steps in (self.encoder_steps, self.selector_steps))
        held = self.hold is not None and self.hold.at(step) is not None
        return 0.0 if rests or held or not self.selects else self.weights.balance_at(step)

    def encode(
        self, samples: Sequence[Sample], rng: random.Random, *, share: float | None = None
    ) -> list[EncodedImage]:
        """Visual tokens by this run's sampler, rival or control; `rng` is for a control that draws.

        share: what the sampler leaves of these samples' maps together; None is its own choice.
        """
        images = [s.image for s in samples]
        if self.map_rival:
            return self.map_rival(self.encoder, images)
        if share is not None:
            maps = self.encoder.project(images)
            finer = finer_for_share(self.encoder.vision_guided_sampler, self.encoder.seen(maps), share)
            return [self.encoder.tokens(feature_map, True, finer=finer) for feature_map in maps]
        if not self.vision_sampler or self.branch_control is None:
            return self.encoder(images, [self.vision_sampler] * len(samples))
        encoded = []
        for sample, features in zip(samples, self.encoder.project(images), strict=True):
            height, width, _ = features.map_HWD.shape
            window = self.config.vision_sampler.window
            choose = self.branch_control.choice(rng, (height, width), window, sample.glyph_boxes)
            encoded.append(self.encoder.tokens(features, True, choose))
        return encoded

    @torch.no_grad()
    def answer(self, samples: Sequence[Sample], rng: random.Random) -> Answers:
        """Scores each branch's own answer; a schedule, where there is one, prunes as it does in training."""
        encoded = self.encode(samples, rng)
        text = to_device(pack_text(samples, self.pad_id), self._device)
        hidden_BQTD, extra = self._run(encoded, text, None, rng)
        target = text.labels_BQT[:, :, 1:]
        likeliest = self.language_model.lm_head(hidden_BQTD[:, :, :-1]).argmax(-1)
        exact_BQ = ((likeliest == target) | (target == -100)).all(-1)
        tokens_BQL = extra["visual_tokens_LR"].T.unflatten(0, text.answer_start_BQ.shape)
        return Answers(encoded=encoded, exact_BQ=exact_BQ, tokens_BQL=tokens_BQL)

    def _run(self, encoded: list[EncodedImage], text: TextBatch, evidence: Any, rng: random.Random, place: int = 0
             ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
        decoder = self.language_model.model
        batch, branches, length = text.token_ids_BQT.shape
        before, visual_lens = len(text.prefix_ids), [len(e.tokens_ND) for e in encoded]
        prefix = before + max(visual_lens)
        words = decoder.embed_tokens(text.prefix_ids)
        visual = nn.utils.rnn.pad_sequence([e.tokens_ND for e in encoded], batch_first=True)
        hidden = torch.cat(
            (words.expand(batch, -1, -1), visual, decoder.embed_tokens(text.token_ids_BQT.flatten(1))), dim=1
        )
        device = hidden.device
        prefix_lens_B = torch.tensor(visual_lens, device=device) + before
        position_ids = positions(prefix_lens_B, prefix, branches, length)
        cos, sin = decoder.rotary_emb(hidden, position_ids)
        mask: torch.Tensor | None = attention_mask(prefix_lens_B, prefix, branches, length)
        cut = self.schedule.draw_layer(rng) if self.schedule else len(decoder.layers)
        if self.schedule:
            for _ in range(place * batch * branches):
                self.schedule.draw_threshold(rng)  # those of the pairs before, in other micro-batches
        extra: dict[str, torch.Tensor] = {}
        grounded: list[torch.Tensor] = []
        stages = dict(self.layer_rival.stages) if self.layer_rival else {}
        present = totals = [count for count in visual_lens for _ in range(branches)]
        asked = (text.answer_start_BQ > 0).flatten().tolist()
        tokens_LR = []
        for index, layer in enumerate(decoder.layers):
            if self.layer_rival and index in stages:
                row = torch.arange(batch * branches, device=device).unsqueeze(1)
                if mask is not None:
                    # From here on each branch has visual tokens of its own.
                    whole = [[torch.arange(count, device=device)] * branches for count in visual_lens]
                    source, starts = gather_index(whole, before, prefix, length)
                    hidden, cos, sin = (x[row // branches, source] for x in (hidden, cos, sin))
                    mask = None
                stay = self.layer_rival.keep(stages[index], layer, hidden, cos, sin, text, before, present, totals)
                source, starts = stage_index(stay, before, starts, length)
                hidden, cos, sin = hidden[row, source], cos[row, source], sin[row, source]
                present = [len(kept) for kept in stay]
                shares = [count / total for count, total, real in zip(present, totals, asked, strict=True) if real]
                extra["kept_share"] = torch.tensor(sum(shares) / len(shares), device="cpu")
            if index == cut:
                assert self.schedule is not None
                thresholds = [[self.schedule.draw_threshold(rng) for _ in range(branches)] for _ in range(batch)]
                kept = decide(layer, hidden, cos, sin, text.instruction_BQT, before, visual_lens, prefix, thresholds)
                source, starts = gather_index(kept, before, prefix, length)
                row = torch.arange(batch, device=device).repeat_interleave(branches).unsqueeze(1)
                hidden, cos, sin = hidden[row, source], cos[row, source], sin[row, source]
                # Padding is on the right only, so plain causal attention is exact.
                mask = None
                present = [len(k) for of_image in kept for k in of_image]
                shares = [count / total for count, total, real in zip(present, totals, asked, strict=True) if real]
                extra["kept_share"] = torch.tensor(sum(shares) / len(shares), device="cpu")
            if self.grounding and evidence is not None and index in self.grounding.taught_layers:
                assert mask is not None
                grounded += self.grounding.losses(index, layer, hidden, cos, sin, mask, text, prefix, evidence)
            tokens_LR.append(present)
            hidden = layer(hidden, attention_mask=mask, position_embeddings=(cos, sin))
        extra["visual_tokens_LR"] = torch.tensor(tokens_LR, device="cpu")
        if grounded:
            extra["grounding"] = torch.stack(grounded).mean()
        hidden = decoder.norm(hidden)
        if mask is not None:
            return hidden[:, prefix:].unflatten(1, (branches, length)), extra
        own = starts.unsqueeze(1) + torch.arange(length, device=device)
        return hidden.gather(1, own.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])).unflatten(
            0, (batch, branches)
        ), extra

    def _language_loss(self, hidden_BQTD: torch.Tensor, text: TextBatch, totals: Totals | None
                       ) -> tuple[torch.Tensor, dict[str, float]]:  # fmt: skip
        """Cross-entropy over answer tokens; accuracy counts branches whose every answer token is the likeliest."""
        target = text.labels_BQT[:, :, 1:]
        answer = target != -100
        logits = self.language_model.lm_head(hidden_BQTD[:, :, :-1][answer]).float()
        loss = nn.functional.cross_entropy(logits, target[answer])
        if totals is not None:
            loss = loss * (len(logits) * totals.micro_batches / totals.counts[0].item())
        wrong = torch.zeros_like(answer)
        wrong[answer] = logits.argmax(-1) != target[answer]
        asked = answer.any(-1)
        exact = (~wrong.any(-1))[asked].float().mean()
        return loss, {"language": loss.item(), "exact": exact.item()}
