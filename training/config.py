"""The typed configuration of a training run, read from YAML."""

from __future__ import annotations

import dataclasses
import pathlib
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml


class ConfigError(ValueError):
    """A configuration file says something that cannot be; names the field and the value."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 100
    clip_norm: float = 1.0
    selector_lr_scale: float = 1.0
    """The vision-guided sampler's learning rate over everybody else's."""
    selector_steps: int = 0
    """Steps that the vision-guided sampler's selector learns for; after them it and the balance loss rest. 0: all."""
    encoder_steps: int = 0
    """Steps that the whole encoder stage learns for, the selector with it: the features that it chooses by then stay as
    they are, and so does what it chooses. 0: all."""
    rest_cooldown: int = 0
    """Steps before its rest in which the learning rate of what comes to rest falls to zero. At full rate the selector
    swings about the shares that the balance loss asks for, and comes to rest wherever it happens to be."""
    vision_lr_scale: float = 1.0
    """The vision tower's. Below 1 it keeps what it knew before: LLaVA-NeXT trains its tower at a fifth."""
    frozen: tuple[str, ...] = ()
    """Parameters whose name starts with one of these are not trained."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """What Ray gives the run."""

    workers: int = 2
    threads_per_worker: int = 1
    use_gpu: bool = False
    cpus_per_worker: float = 1.0
    max_failures: int = 2
    storage_path: str = "~/focusllava/runs"
    """Folder (or fsspec URI that all nodes reach) of checkpoints."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of weights and activations; the optimizer keeps float32. "auto": bfloat16 on GPUs and where every worker's CPU
    multiplies in it, else float32."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One stage of training."""

    name: str
    """The same name and storage path resume a stopped run."""
    steps: int
    samples_per_worker: int
    """Images (vision stage: tiles) a worker sees in one step."""
    output: str
    """Folder that the trained weights are exported to."""
    init_from: str = ""
    """Exported weights of an earlier stage, or an imported checkpoint; empty starts from nothing."""
    seed: int = 0
    checkpoint_every: int = 200
    log_every: int = 10
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    stage: dict[str, Any] = field(default_factory=dict)
    """Settings of the stage itself; see its own dataclass."""


def load(path: str | pathlib.Path, overrides: list[str] | None = None) -> RunConfig:
    """Reads YAML; `overrides` such as ["steps=10", "stage.balance=0"] replace single values."""
    raw = yaml.safe_load(pathlib.Path(path).read_text(encoding="utf8"))
    for override in overrides or []:
        key, separator, value = override.partition("=")
        if not separator:
            raise ConfigError(f"--set {override}: expected name=value")
        target = raw
        *parents, last = key.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = yaml.safe_load(value)
    return build(RunConfig, raw)


def build(cls: type, raw: dict[str, Any], prefix: str = "") -> Any:
    """A dataclass from a mapping, nested ones too. Raises ConfigError naming an unknown, missing or mistyped field."""
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in raw:
        if name not in fields:
            raise ConfigError(f"{prefix}{name}: unknown field; {cls.__name__} has {', '.join(fields)}")
    values: dict[str, Any] = {}
    for name, spec in fields.items():
        if name not in raw:
            if spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
                raise ConfigError(f"{prefix}{name}: is missing")
            continue
        value, hint = raw[name], hints[name]
        if dataclasses.is_dataclass(hint):
            value = build(hint, value, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif isinstance(value, list):
            value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
        elif hint is float and isinstance(value, int | str):
            try:
                value = float(value)
            except ValueError:
                raise ConfigError(f"{prefix}{name}: {value!r} is not a number") from None
        if hint in (int, str, bool) and type(value) is not hint:
            raise ConfigError(f"{prefix}{name}: {value!r} is not of type {hint.__name__}")
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ConfigError(f"{prefix}{name}: {value!r} is not one of {', '.join(map(str, get_args(hint)))}")
        values[name] = value
    return cls(**values)
