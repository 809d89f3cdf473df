"""Stages on conversations of a file or a mixture: `pretrain.py` aligns the projector, `finetune.py` trains all."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import pathlib
import random
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

from services.checkpoint.config import FocusLlavaConfig
from services.common.errors import InvalidInput
from services.common.settings import build_settings
from services.compute.dtypes import choose_dtype
from services.modeling.model import FocusLlavaForConditionalGeneration
from services.modeling.packing import TrainedSequence
from services.modeling.pruning import PruneDraw
from training.config import RunConfig, run_folder
from training.conversation_settings import ConversationStage, LoraSettings
from training.data.loading import ConversationLoader
from training.global_batch import Totals, accumulation
from training.initial_weights import load_model
from training.micro_batch import counted, logged, part_of_loss
from training.optimizer import LANGUAGE_MODEL, PROJECTOR, SELECTOR, TOWER, deepspeed_config, part_of
from training.plan.operations import sample_operations
from training.plan.parameters import Lora, Trained
from training.plan.workload import Workload
from training.validation import Validation, append
from training.whole_weights import exported_tensors

Batch = tuple[int, list[TrainedSequence]]
"""A micro-batch's place in its global batch, and its conversations."""


class ConversationModule(nn.Module):
    """The model as the trainer calls it: a micro-batch to its part of the global batch's loss."""

    def __init__(self, model: FocusLlavaForConditionalGeneration, stage: ConversationStage, seed: int):
        super().__init__()
        self.model, self.stage, self.seed = model, stage, seed

    @property
    def selects(self) -> bool:
        """Whether the selector learns."""
        parameters = self.model.encoder.vision_guided_sampler.parameters()
        return self.stage.vision_sampler and any(parameter.requires_grad for parameter in parameters)

    def forward(self, batch: Batch, step: int, totals: Totals | None = None) -> tuple[torch.Tensor, dict[str, float]]:
        """What is drawn depends on seed, step and the conversation's number alone. Totals as of `count`."""
        _, sequences = batch
        loss, found = part_of_loss(
            self.model,
            sequences,
            totals,
            draw=self.draw(sequences, step),
            vision_sampler=self.stage.vision_sampler,
            balance_weight=self.balance_weight(step),
        )
        return loss, {**logged(found, totals), "flops": self._operations(found, sequences)}

    def count(self, batch: Batch, step: int) -> torch.Tensor:
        """float64 [1 + K]: answer tokens, and regions by branch where the balance loss has a weight."""
        return counted(self.model, batch[1], regions=bool(self.balance_weight(step)))

    def draw(self, sequences: list[TrainedSequence], step: int) -> PruneDraw | None:
        """One layer a step, one threshold a conversation."""
        if self.stage.prune is None:
            return None
        layer = self.stage.prune.draw_layer(random.Random(f"{self.seed}/{step}"))
        draws = (random.Random(f"{self.seed}/{step}/{sequence.number}") for sequence in sequences)
        return PruneDraw(layer=layer, thresholds=tuple(self.stage.prune.draw_threshold(rng) for rng in draws))

    def balance_weight(self, step: int) -> float:
        return self.stage.balance if self.selects else 0.0

    def _operations(self, found: dict[str, float], sequences: list[TrainedSequence]) -> float:
        """Operations that this micro-batch's mathematics asks for, its conversations taken for alike."""
        visual, layer, samples = found["visual_tokens"], found.get("prune_layer"), len(sequences)
        work = Workload(
            tiles=round(sum(len(i.pixels_T3HW) for s in sequences for i in s.images) / samples),
            map_tokens=round(found["uncompressed_tokens"] / samples),
            text_tokens=round(found["text_tokens"] / samples),
            answer_tokens=round(found["answer_tokens"] / samples),
            vision_share=visual / (found["uncompressed_tokens"] or 1),
            text_share=found["kept_tokens"] / (visual or 1),
            cuts=() if layer is None else (int(layer),),
        )
        learns = {part_of(name) for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        trained = Trained(
            vision_tower=TOWER in learns,
            projector=PROJECTOR in learns,
            selector=SELECTOR in learns,
            language_model=LANGUAGE_MODEL in learns and self.stage.lora is None,
            lora=Lora(rank=self.stage.lora.rank, targets=self.stage.lora.targets) if self.stage.lora else None,
        )
        return samples * sample_operations(self.model.config.checkpoint, trained, work, checkpointing=False).model


class ConversationTask:
    """Task of `training/finetune.py` on conversations, from a checkpoint's folder."""

    part: Literal["pretrain", "finetune"] | None = None
    """The mixture's sources that are trained on where the settings do not say."""

    def __init__(self, run: RunConfig):
        if not run.init_from:
            raise InvalidInput("is empty, expected the folder of a checkpoint", field="init_from")
        self.run = run
        self.stage = stage = build_settings(ConversationStage, run.stage, "stage.")
        longest = stage.longest(FocusLlavaConfig.load(run.init_from))
        self._told = 0
        """Unusable entries that have been named."""
        self._before: dict[str, int] = {}
        """What had come of the data before this process began."""
        together = torch.distributed.is_initialized()
        self.workers = torch.distributed.get_world_size() if together else 1
        self.rank = torch.distributed.get_rank() if together else 0
        self.loader = ConversationLoader(
            stage.data,
            run.init_from,
            batch_size=run.samples_per_worker,
            accumulation=accumulation(run, self.workers),
            seed=run.seed,
            root=stage.root,
            images=stage.images,
            stage=stage.part or self.part,
            max_length=longest,
            template=stage.template,
            processes=stage.processes,
            prefetch=stage.prefetch,
            max_bad_share=stage.max_bad_share,
        )
        self.module = ConversationModule(start_model(run, stage), stage, run.seed)
        self.validation: Validation | None = None
        if held_out := stage.validation:
            asked = ConversationLoader(
                held_out.data,
                run.init_from,
                batch_size=1,
                images=held_out.images,
                max_length=longest,
                template=stage.template,
                max_bad_share=1.0,
            )
            self.validation = Validation(
                held_out, asked, vision_sampler=stage.vision_sampler, text_sampler=stage.prune is not None
            )

    def batch(self, step: int, place: int, places: int) -> Batch:
        micro, rank = divmod(place, self.workers)
        sequences = self.loader.batch(step, micro, rank, self.workers)
        for fault in self.loader.faults[self._told :]:
            print(f"warning: left out {fault}", flush=True)
        self._told = len(self.loader.faults)
        return place, sequences

    def count(self, batch: Batch, step: int) -> torch.Tensor:
        return self.module.count(batch, step)

    def identity(self) -> str:
        return self.loader.identity()

    def epoch(self) -> int:
        return self.loader.steps_per_epoch(self.workers)

    def state(self) -> dict[str, int]:
        """What has come of the data, on all workers and since the run began."""
        own = self.loader.counters()
        everyone: list[Any] = [own] * self.workers
        if self.workers > 1:
            torch.distributed.all_gather_object(everyone, own)
        return {name: self._before.get(name, 0) + sum(counters[name] for counters in everyone) for name in own}

    def load(self, state: dict[str, int]) -> None:
        self._before = state
        self.loader.count_on(state)

    def close(self) -> None:
        """Says what came of the data, and ends those that read it."""
        counts = {name: count for name, count in self.state().items() if count}
        if self.rank == 0:
            print("data: " + ", ".join(f"{count} {name}" for name, count in counts.items()), flush=True)
        self.loader.close()

    def export(self, folder: pathlib.Path) -> None:
        model, stage = self.module.model, self.stage
        config = model.config.checkpoint
        vision, text = config.vision_sampler, config.text_sampler
        if self.module.selects:
            vision = dataclasses.replace(vision, enabled=True)
        if stage.prune:
            # The words of all turns chose in training: the loader marks them.
            text = dataclasses.replace(text, enabled=True, instruction="all_turns")
        model.config.checkpoint = dataclasses.replace(config, vision_sampler=vision, text_sampler=text)
        adapters = model._hf_peft_config_loaded
        model._hf_peft_config_loaded = False  # with it the adapters alone would be written
        tensors = exported_tensors(model)
        if self.rank == 0:
            model.save_pretrained(folder, state_dict=tensors)
        else:
            collections.deque(tensors, maxlen=0)  # takes part in gathering them
        model.config.checkpoint, model._hf_peft_config_loaded = config, adapters

    def validate(self, step: int) -> dict[str, float]:
        """Loss on the held-out conversations; some answers go to the table in the run's folder."""
        if self.validation is None:
            return {}
        model = self.module.model
        device = next(model.parameters()).device
        found = {"validation_loss": self.validation.loss(model, device)}
        first = self.rank == 0
        if first or self.run.cluster.zero_stage == 3:  # where weights are sharded, all workers have to compute
            rows = self.validation.answers(model, self.loader.encoder.renderer.tokenizer, device)
            if first and (folder := run_folder(self.run)):
                append(folder, step, rows)
        return found


class AlignmentTask(ConversationTask):
    """Task of `training/pretrain.py` on conversations: the projector and `image_newline` alone, all visual tokens."""

    part = "pretrain"

    def __init__(self, run: RunConfig):
        # The samplers come with fine-tuning: nothing that this stage trains would learn from them.
        super().__init__(dataclasses.replace(run, stage={"vision_sampler": False, **run.stage}))
        for name, parameter in self.module.model.named_parameters():
            parameter.requires_grad_(part_of(name) == PROJECTOR)


def start_model(run: RunConfig, stage: ConversationStage) -> FocusLlavaForConditionalGeneration:
    """The checkpoint's model with the run's changes, of which only what learns requires gradients."""
    dtype = choose_dtype(run.cluster.dtype, "cuda" if run.cluster.use_gpu else "cpu")
    saved = FocusLlavaConfig.load(run.init_from)
    config = build_settings(FocusLlavaConfig, stage.model, "stage.model.", over=saved)
    stage.check_model(config)
    # Under ZeRO-3 transformers refuses a sampler of another shape: with one, every worker loads the whole model.
    sharded = run.cluster.zero_stage == 3 and config.vision_sampler == saved.vision_sampler
    with made_in_partitions(run, dtype) if sharded else contextlib.nullcontext():
        model = load_model(run.init_from, config, dtype)
    if stage.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if not stage.vision_sampler:
        model.encoder.vision_guided_sampler.requires_grad_(False)
    if stage.lora:
        add_lora(model, stage.lora)
    return model


@contextlib.contextmanager
def made_in_partitions(run: RunConfig, dtype: torch.dtype) -> Iterator[None]:
    """Has `from_pretrained` make of each weight this worker's part alone. The first worker reads the checkpoint and
    gives the others their parts, a module at a time. Called by all workers at once."""
    from transformers.integrations import deepspeed

    known = deepspeed.HfDeepSpeedConfig(deepspeed_config(run, dtype, 1))  # transformers asks for it while it lives
    try:
        yield
    finally:
        deepspeed.unset_hf_deepspeed_config()
        del known


def add_lora(model: FocusLlavaForConditionalGeneration, lora: LoraSettings) -> None:
    """Puts adapters beside the language model's layers, whose own weights then rest. Needs PEFT."""
    try:
        from peft import LoraConfig
    except ImportError:
        raise InvalidInput("needs PEFT, which focusllava[train] brings: pip install peft", field="stage.lora") from None
    wanted = rf"language_model\..*\.({'|'.join(lora.targets)})"
    trained = [parameter for name, parameter in model.named_parameters() if part_of(name) != LANGUAGE_MODEL]
    learns = [parameter.requires_grad for parameter in trained]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT divides it by the rank, whatever its type
        lora_dropout=lora.dropout,
        target_modules=wanted,
    )
    model.add_adapter(config)
    for parameter, on in zip(trained, learns, strict=True):  # PEFT rests all that is no adapter
        parameter.requires_grad_(on)
