"""The typed configuration of a training run, read from YAML."""

from __future__ import annotations

import pathlib
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import yaml

from services.common.errors import InvalidInput
from services.common.settings import Amount, Count, Natural, Range, build_settings, require

REFUSED, STOPPED = "refused", "stopped"
"""How a run ends that no repetition would mend: its settings are wrong, or its loss is."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a warm-up, whose first step has a rate of 0, and a cosine's decay to a floor."""

    learning_rate: Amount = 1e-5
    """The language model's, and that of all parts whose scale is 1."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: Amount = 0.0
    warmup_steps: Natural = 100
    warmup_share: Annotated[float, Range(0, 1)] | None = None
    """The warm-up as a share of the run's steps, in place of `warmup_steps`; LLaVA takes 0.03."""
    warmup: Literal["logarithmic", "linear"] = "logarithmic"
    """How the rate rises: DeepSpeed's own way, or LLaVA's."""
    floor: Annotated[float, Range(0, 1)] = 0.02
    """Where the cosine ends, as a share of the learning rate."""
    clip_norm: Amount = 1.0
    selector_lr_scale: Amount = 1.0
    """The vision-guided sampler's learning rate over `learning_rate`."""
    selector_steps: Natural = 0
    """Steps that the vision-guided sampler's selector learns for; after them it and the balance loss rest. 0: all."""
    encoder_steps: Natural = 0
    """Steps that the whole encoder stage learns for, the selector with it: the features that it chooses by then stay as
    they are, and so does what it chooses. 0: all."""
    rest_cooldown: Natural = 0
    """Steps before its rest in which the learning rate of what comes to rest falls to zero. At full rate the selector
    swings about the shares that the balance loss asks for, and comes to rest wherever it happens to be."""
    vision_lr_scale: Amount = 1.0
    """The vision tower's. Below 1 it keeps what it knew before: LLaVA-NeXT trains its tower at a fifth."""
    projector_lr_scale: Amount = 1.0
    """The projector's, with `image_newline`."""
    frozen: tuple[str, ...] = ()
    """Parameters whose name starts with one of these are not trained."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """What Ray gives the run."""

    workers: Count = 2
    threads_per_worker: Count = 1
    use_gpu: bool = False
    cpus_per_worker: Amount = 1.0
    max_failures: int = 2
    """Lost workers that the run itself recovers from; after them it ends, and the same command goes on."""
    storage_path: str = "~/focusllava/runs"
    """Folder (or fsspec URI that all nodes reach) of checkpoints and logs."""
    zero_stage: Literal[2, 3] = 2
    """What DeepSpeed shards over the workers: 2 gradients and optimizer states, 3 the weights too."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What waits in the host's memory on GPUs: nothing, optimizer states, or the weights of ZeRO 3 too."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of weights and activations; the optimizer keeps float32. "auto": bfloat16 on GPUs and if every worker's CPU
    multiplies in it, else float32."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One stage of training."""

    name: str
    """The same name and storage path resume a stopped run."""
    samples_per_worker: Count
    """The micro-batch: images, conversations, or the vision stage's tiles, that a worker sees at once."""
    output: str
    """Folder that the trained weights are exported to."""
    steps: Natural = 0
    """Steps of the optimizer; 0 where `epochs` says how many."""
    epochs: Amount = 0.0
    """Passes over the data, in place of `steps`; conversations only."""
    init_from: str = ""
    """Exported weights of an earlier stage, or an imported checkpoint; empty starts from nothing."""
    global_batch: Natural = 0
    """Samples of a step over all workers: a whole multiple of `samples_per_worker` x workers, accumulated. 0: once."""
    seed: int = 0
    checkpoint_every: Count = 200
    checkpoints_kept: Count = 2
    """The newest checkpoints that stay."""
    log_every: Count = 10
    report_to: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ("tensorboard",)
    """Where the log's values go besides; MLflow and Weights & Biases read their own environment variables."""
    validate_every: Natural = 0
    """Steps between two looks at what `stage.validation` holds out; the best weights are exported beside `output`."""
    max_loss_ratio: Amount = 10.0
    """The loss of a step over its running mean that stops the run, as a loss that is not a number always does; ten
    times as much in the first 20 steps. A mean below 0.1 counts as 0.1; 0 lets every number pass."""
    skip_steps: tuple[int, ...] = ()
    """Steps whose batches are left out: the message of a run that stopped names one. A resumed run may change it."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    stage: dict[str, Any] = field(default_factory=dict)
    """Settings of the stage itself; see its own dataclass."""

    def __post_init__(self) -> None:
        require(bool(self.steps or self.epochs), "steps", self.steps, "1 or more, or epochs above 0")
        require(not (self.steps and self.epochs), "epochs", self.epochs, f"0 beside steps {self.steps}")


def run_folder(run: RunConfig) -> pathlib.Path | None:
    """Where Ray keeps the run's checkpoints; None where that is no folder of this machine's."""
    storage = run.cluster.storage_path
    return None if "://" in storage else pathlib.Path(storage).expanduser() / run.name


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number, as YAML 1.2 does; to YAML 1.1 it is text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load(path: str | pathlib.Path, overrides: list[str] | None = None) -> RunConfig:
    """Reads YAML; `overrides` such as ["steps=10", "stage.loss.balance=0"] replace single values.

    Raises InvalidInput naming the field and the value.
    """
    raw = yaml.load(pathlib.Path(path).read_text(encoding="utf8"), _Loader)
    for override in overrides or []:
        key, separator, value = override.partition("=")
        if not separator:
            raise InvalidInput("expected name=value", field=f"--set {override}")
        target = raw
        *parents, last = key.split(".")
        for parent in parents:
            target = target.setdefault(parent, {}) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            raise InvalidInput(f"{'.'.join(parents) or path} is not a mapping", field=f"--set {override}")
        target[last] = yaml.load(value, _Loader)
    return build_settings(RunConfig, raw)
