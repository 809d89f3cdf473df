"""What the study trains: the settings of study.yaml, each a way to train and to evaluate the model."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

STUDY: dict[str, Any] = yaml.safe_load((pathlib.Path(__file__).parent / "study.yaml").read_text("utf8"))
"""What study.yaml says; `evaluation.study.tables` takes its tables from here."""
SHARES: Sequence[float] = STUDY["shared"][0]
OURS = "both"
"""Both samplers: what the study is about."""
LEAST_LAYER_BUDGET = 0.2
"""Converted share of a rival inside the language model: its first layer of six sees all tokens, 17 % by itself."""
AS_WRITTEN: dict[str, Any] = {"selector_input": "base_tile", "similarity": "inner_product", "region_pool": "mean",
              "probability_gate": "paper", "selector_temperature": 1.0,
              "balance_coefficients": [1.0, 1.0, 1.0]}  # fmt: skip
"""The sampler of the paper to the letter: inner products with the base tile, Eq. 2, Eq. 3."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to train and to evaluate the model."""

    name: str
    title: str
    stage: Mapping[str, Any] = field(default_factory=dict)
    """Over STAGE, mappings merged field by field; with `weights_of`, over that setting's and when evaluated only."""
    text: tuple[int, float] | None = None
    """Layer and threshold of the text-guided sampler when evaluated; None leaves it off."""
    permuted: bool = False
    """Evaluated with the branches that the selector chose dealt to the regions anew, at random, image by image."""
    weights_of: str = ""
    """The setting whose trained weights are evaluated as they are; empty trains its own."""
    match: str = ""
    """The setting that this one's tokens are made equal to, seed by seed: its result on the validation split gives the
    budget or the shares that `stage` leaves out."""

    @property
    def train(self) -> bool:
        return not self.weights_of

    @property
    def selects(self) -> bool:
        """Whether a selector is trained."""
        control = self.stage.get("branch_control", {}).get("name", "no_task_gradient")
        return bool(self.stage.get("vision_sampler")) and control == "no_task_gradient"

    @property
    def needs(self) -> tuple[str, ...]:
        """Settings whose result or weights come first."""
        return tuple(dict.fromkeys(name for name in (self.weights_of, self.match) if name))


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over `base`; where both hold a mapping, field by field."""
    result = dict(base)
    for name, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = merged(result[name], value) if both else value
    return result


def coefficients(shares: Sequence[float]) -> list[float]:
    """c of Eq. 10 for which the loss is level where branches are used with these shares: c_k ~ 1 / share_k, sum K."""
    inverse = [1 / share for share in shares]
    return [round(len(inverse) * value / sum(inverse), 4) for value in inverse]


def _vision(*, shares: Sequence[float] = SHARES, **sampler: Any) -> dict[str, Any]:
    """Stage of a vision-guided sampler; `sampler` are fields of VisionSamplerConfig."""
    fields = {"balance_coefficients": coefficients(shares), **sampler}
    return merged(STUDY["vision"], {"model": {"vision_sampler": fields}})


def _setting(raw: dict[str, Any]) -> Setting:
    stage: dict[str, Any] = {}
    if "vision" in raw or "control" in raw:
        stage = _vision(**raw.pop("vision", {}))
    if "control" in raw:
        stage["branch_control"] = raw.pop("control")
    if "balance" in raw:
        # One weight from the first step on.
        stage = {**_vision(**AS_WRITTEN), "loss": {"balance": raw.pop("balance")}}
    if "map_rival" in raw:
        stage["map_rival"] = {**STUDY["map_rival"], **raw.pop("map_rival")}
    text = tuple(raw.pop("text")) if "text" in raw else None
    return Setting(**{**raw, "stage": merged(stage, raw.get("stage", {})), "text": text})


SETTINGS: dict[str, Setting] = {raw["name"]: _setting(dict(raw)) for raw in STUDY["settings"]}


def resolved(setting: Setting, shares: Sequence[float], converted_percent: float) -> Setting:
    """The setting with the budget or shares that it takes from what it is matched with."""
    stage = dict(setting.stage)
    rival = stage.get("layer_rival", {})
    if rival and "budget" not in rival:
        stage["layer_rival"] = {**rival, "budget": round(max(converted_percent / 100, LEAST_LAYER_BUDGET), 4)}
    control = stage.get("branch_control", {})
    if control.get("name") == "random" and "shares" not in control:
        stage["branch_control"] = {**control, "shares": [round(share, 4) for share in shares]}
    return dataclasses.replace(setting, stage=stage)
