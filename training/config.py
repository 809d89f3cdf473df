"""The typed configuration of a training run, read from YAML."""

from __future__ import annotations

import pathlib
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from services.common.errors import InvalidInput
from services.common.settings import Amount, Count, Natural, build_settings


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with DeepSpeed's warm-up (logarithmic: the first step has a rate of 0) and cosine decay."""

    learning_rate: Amount = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: Amount = 0.0
    warmup_steps: Natural = 100
    clip_norm: Amount = 1.0
    selector_lr_scale: Amount = 1.0
    """The vision-guided sampler's learning rate over everybody else's."""
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
    storage_path: str = "~/focusllava/runs"
    """Folder (or fsspec URI that all nodes reach) of checkpoints."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of weights and activations; the optimizer keeps float32. "auto": bfloat16 on GPUs and if every worker's CPU
    multiplies in it, else float32."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One stage of training."""

    name: str
    """The same name and storage path resume a stopped run."""
    steps: Count
    samples_per_worker: Count
    """Images (vision stage: tiles) a worker sees in one step."""
    output: str
    """Folder that the trained weights are exported to."""
    init_from: str = ""
    """Exported weights of an earlier stage, or an imported checkpoint; empty starts from nothing."""
    seed: int = 0
    checkpoint_every: Count = 200
    log_every: Count = 10
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    stage: dict[str, Any] = field(default_factory=dict)
    """Settings of the stage itself; see its own dataclass."""


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
