"""A fixed held-out set: its loss, and some answers that the model writes by itself, kept as a table."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from services.modeling.images import batched
from services.modeling.model import FocusLlavaForConditionalGeneration
from services.modeling.packing import TrainedSequence
from services.modeling.pruning import PruneDraw
from training.conversation_settings import HeldOut
from training.data.loading import ConversationLoader
from training.global_batch import to_device

IGNORED = -100
TABLE = "answers.jsonl"
"""The table's name in the run's folder: a line an answer, with the step, the entry, what is right and what was said."""


class Validation:
    """Asks the model with both samplers as the checkpoint is served. Called by all workers at once."""

    def __init__(self, held_out: HeldOut, loader: ConversationLoader, *, vision_sampler: bool, text_sampler: bool):
        """loader: of the held-out set, a micro-batch of one sequence. The samplers: those that the run trains with."""
        self.held_out, self.loader = held_out, loader
        self.vision_sampler, self.text_sampler = vision_sampler, text_sampler

    @torch.no_grad()
    def loss(self, model: FocusLlavaForConditionalGeneration, device: torch.device) -> float:
        """Mean loss of the held-out answer tokens over all workers."""
        rank, workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for step in range(-(-self._entries // workers)):
            (sequence,) = to_device(self.loader.batch(step, 0, rank, workers), device)
            loss, metrics = model.training_step(
                [sequence], draw=self._draw(model), vision_sampler=self.vision_sampler, answer_tokens=1.0
            )
            sums += torch.stack((loss.detach().double(), torch.tensor(metrics["answer_tokens"], device=device)))
        torch.distributed.all_reduce(sums)
        return (sums[0] / sums[1]).item()

    @torch.no_grad()
    def answers(self, model: FocusLlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase,
                device: torch.device) -> list[dict[str, Any]]:  # fmt: skip
        """Rows of the table, without their step."""
        rows = []
        for step in range(min(self.held_out.answers, self._entries)):
            (sequence,) = self.loader.batch(step, 0, 0, 1)
            prompt, expected = split(sequence, model.config.image_token_id)
            inputs: dict[str, Any] = {
                "input_ids": prompt.input_ids[None],
                "attention_mask": torch.ones_like(prompt.input_ids)[None],
                "instruction_mask": prompt.instruction[None],
            }
            if prompt.images:
                inputs["pixel_values"], inputs["image_sizes"] = batched(prompt.images)
            said = model.generate(
                **to_device(inputs, device),
                max_new_tokens=self.held_out.answer_tokens,
                do_sample=False,
                vision_sampler=self.vision_sampler,
                text_sampler=self.text_sampler,
            )
            words = prompt.input_ids[prompt.instruction]
            rows.append(
                {
                    "entry": sequence.name,
                    "asked": tokenizer.decode(words, skip_special_tokens=True),
                    "right": tokenizer.decode(expected, skip_special_tokens=True),
                    "said": tokenizer.decode(said[0, len(prompt.input_ids) :], skip_special_tokens=True),
                }
            )
        return rows

    @property
    def _entries(self) -> int:
        return min(self.held_out.entries, self.loader.entries)

    def _draw(self, model: FocusLlavaForConditionalGeneration) -> PruneDraw | None:
        served = model.config.checkpoint.text_sampler
        return PruneDraw(layer=served.layer, thresholds=(served.threshold,)) if self.text_sampler else None


def split(sequence: TrainedSequence, image_token_id: int) -> tuple[TrainedSequence, torch.Tensor]:
    """A conversation up to its first answer, and that answer's tokens."""
    learnt = (sequence.labels != IGNORED).nonzero()[:, 0]
    start = int(learnt[0])
    stop = start + int((sequence.labels[start:] != IGNORED).long().cumprod(0).sum())
    prompt = TrainedSequence(
        input_ids=sequence.input_ids[:start],
        labels=sequence.labels[:start],
        instruction=sequence.instruction[:start],
        images=sequence.images[: int((sequence.input_ids[:start] == image_token_id).sum())],
        name=sequence.name,
    )
    return prompt, sequence.labels[start:stop]


def append(folder: pathlib.Path, step: int, rows: list[dict[str, Any]]) -> None:
    """Adds the answers of a step to the table in the folder."""
    with (folder / TABLE).open("a", encoding="utf8") as table:
        table.writelines(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows)
