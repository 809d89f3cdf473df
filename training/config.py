"""The typed configuration of a training run, read from YAML."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml

Count = Annotated[int, 1]
"""At least 1; an annotation's second part is the least value that `build` takes."""
Steps = Annotated[int, 0]
Amount = Annotated[float, 0]


class ConfigError(ValueError):
    """A configuration file says something that cannot be; names the field and the value."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with DeepSpeed's warm-up (logarithmic: the first step has a rate of 0) and cosine decay."""

    learning_rate: Amount = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: Amount = 0.0
    warmup_steps: Steps = 100
    clip_norm: Amount = 1.0
    selector_lr_scale: Amount = 1.0
    """The vision-guided sampler's learning rate over everybody else's."""
    selector_steps: Steps = 0
    """Steps that the vision-guided sampler's selector learns for; after them it and the balance loss rest. 0: all."""
    encoder_steps: Steps = 0
    """Steps that the whole encoder stage learns for, the selector with it: the features that it chooses by then stay as
    they are, and so does what it chooses. 0: all."""
    rest_cooldown: Steps = 0
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
            target = target.setdefault(parent, {}) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override}: {'.'.join(parents) or path} is not a mapping")
        target[last] = yaml.safe_load(value)
    return build(RunConfig, raw)


def build(cls: type, raw: Any, prefix: str = "") -> Any:
    """A dataclass from a mapping, nested ones too. Raises ConfigError naming a field that is unknown or missing, or its
    value where that is of another type or too small."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{prefix.removesuffix('.') or 'the configuration'}: {raw!r} is not a mapping")
    hints = get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in raw:
        if name not in fields:
            raise ConfigError(f"{prefix}{name}: unknown field; {cls.__name__} has {', '.join(fields)}")
    for name, spec in fields.items():
        if name not in raw and spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{prefix}{name}: is missing")
    return cls(**{name: _value(value, hints[name], f"{prefix}{name}") for name, value in raw.items()})


def _value(value: Any, hint: Any, name: str) -> Any:
    """The value as its type hint has it; lists become tuples, and a number may be written as a string (1e-4)."""
    if get_origin(hint) is Annotated:
        hint, least = get_args(hint)
        value = _value(value, hint, name)
        if value < least:
            raise ConfigError(f"{name}: {value!r} is less than {least}")
        return value
    if dataclasses.is_dataclass(hint):
        return build(hint, value, f"{name}.")  # type: ignore[arg-type]
    origin, parts = get_origin(hint), get_args(hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{name}: {value!r} is not a list")
        of_each = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        if len(of_each) != len(value):
            raise ConfigError(f"{name}: {value!r} has {len(value)} entries, expected {len(of_each)}")
        return tuple(
            _value(one, part, f"{name}[{n}]") for n, (one, part) in enumerate(zip(value, of_each, strict=True))
        )
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name}: {value!r} is not a mapping")
        return {key: _value(one, parts[1], f"{name}.{key}") for key, one in value.items()}
    if origin is Literal and value not in parts:
        raise ConfigError(f"{name}: {value!r} is not one of {', '.join(map(str, parts))}")
    if hint is float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ConfigError(f"{name}: {value!r} is not a number")
        return number
    if hint in (int, str, bool) and type(value) is not hint:
        raise ConfigError(f"{name}: {value!r} is not of type {hint.__name__}")
    return value
