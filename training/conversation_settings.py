"""The settings of a stage that trains on conversations: `stage` of a run's YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from services.checkpoint.config import FocusLlavaConfig
from services.common.settings import Amount, Count, Natural, Range, check_settings, require
from services.modeling.pruning import PruneSchedule
from training.sampler_settings import check_cut_fits, check_trained_are_on

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""A decoder layer's linear layers."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank updates of the decoder's linear layers, in place of its own weights; merged into them at export."""

    rank: Count = 128
    alpha: Amount = 256.0
    """The update is scaled by alpha over rank."""
    dropout: Annotated[float, Range(0, 1)] = 0.0
    targets: tuple[str, ...] = LINEAR

    def __post_init__(self) -> None:
        check_settings(self)
        for target in self.targets:
            require(target in LINEAR, "targets", target, f"one of {', '.join(LINEAR)}")


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What is held out, and how much of it is asked each time."""

    data: str
    """A mixture's YAML, or a data file, folder or glob, as the stage's own."""
    images: str = ""
    """The folder that the paths of a data file's images begin in."""
    entries: Count = 64
    """Conversations whose loss is taken, the first in an order of their own."""
    answers: Natural = 8
    """Answers that are written out, to the first question of as many conversations."""
    answer_tokens: Count = 48
    """Most tokens of such an answer."""


LONGEST = 6144
"""Most tokens of a sequence where nothing else is said, two images of the largest size and their words."""


@dataclass(frozen=True, kw_only=True)
class ConversationStage:
    """What is trained on, and how a conversation becomes a sequence."""

    data: str
    """A mixture's YAML, or a data file, folder or glob, as `training.data.loading` opens them."""
    root: str = ""
    """The folder that a mixture's paths begin in; empty is what it says itself."""
    images: str = ""
    """The folder that the paths of a data file's images begin in."""
    part: Literal["pretrain", "finetune"] | None = None
    """The mixture's sources for one stage of training alone."""
    template: Literal["chat", "plain"] = "chat"
    """plain: an image and its caption, without the words of a chat."""
    max_length: Count | None = None
    """Most tokens of a sequence, all visual tokens counted; an answer is cut from its end. None: 6,144, or the model's
    context where that is less."""
    max_bad_share: Annotated[float, Range(0, 1)] = 0.01
    """The share of unusable entries above which the run ends."""
    processes: Natural = 2
    """Background processes of each worker that read, decode and tile."""
    prefetch: Count = 4
    """Micro-batches that they are ahead, together."""
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of FocusLlavaConfig, which checks them, on top of init_from's."""
    vision_sampler: bool = True
    """Whether the vision-guided sampler is on."""
    prune: PruneSchedule | None = None
    """None trains without text-guided pruning."""
    balance: Amount = 0.1
    """alpha of Eq. 3: the weight of the balance loss."""
    validation: HeldOut | None = None
    """What the run's `validate_every` looks at."""
    gradient_checkpointing: bool = False
    """Whether a layer's activations are computed again in the backward pass: memory for a third of the time."""
    lora: LoraSettings | None = None
    """None trains the language model's own weights, unless they are frozen."""

    def __post_init__(self) -> None:
        check_settings(self)
        check_trained_are_on(self.model, vision_sampler=self.vision_sampler, prune=self.prune)

    def longest(self, config: FocusLlavaConfig) -> int:
        """Most tokens of a sequence of this model."""
        return self.max_length or min(LONGEST, config.text_config.max_position_embeddings)

    def check_model(self, config: FocusLlavaConfig) -> None:
        """Raises InvalidInput for what a model of this configuration cannot do."""
        context = config.text_config.max_position_embeddings
        fits = self.max_length is None or self.max_length <= context
        require(fits, "stage.max_length", self.max_length, f"the model's context {context} or less")
        check_cut_fits(self.prune, config)
