"""What one run of the study found, one JSON file each, and its spread over seeds."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from evaluation.scenes.scoring import Tally
from services.common.errors import InvalidInput
from training.data.pairs import PosterSplit

RESULTS_FOLDER = "results"
"""The folder of results in the study's folder."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One setting, trained with one seed, scored on one split. Percentages run from 0 to 100."""

    setting: str
    """Name in `evaluation.study.settings.SETTINGS`."""
    seed: int
    split: PosterSplit
    """Settings are chosen on "validation" and reported on "test"."""
    steps: int
    """Training steps; what is only evaluated has those of the weights that it takes."""
    images: int
    """Images scored."""
    exact: dict[str, Tally]
    """Exact match by kind of question, by group ("fine", "coarse") and over "all"."""
    sampled_percent: float
    """Visual tokens that enter the language model, of the uncompressed ones; base tile and newlines count."""
    kept_percent: float
    """Share left in the last layer, after the text-guided sampler or a rival inside the model."""
    converted_percent: float
    """Averaged over its layers: the paper's converted remaining tokens (Sec. 4.4)."""
    map_percent: float
    """Tokens that come out of the feature map, base tile and newlines apart, of the map's."""
    branch_shares: dict[str, list[float]] = field(default_factory=dict)
    """Share of regions that use each branch: of "all", and of those with a "glyph" (or a bar), else a "shape", else a
    "distractor", else the rest of a "panel" (card, chart or table), or "empty". No entries without a vision-guided
    sampler."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Lines of the training log: step, loss, exact (share of questions), branch_0, branch_1, ..., sampled_share (of
    the uncompressed tokens), kept_share (of those that entered the model); running means over some ten steps."""
    question_ms: float | None = None
    """Median time from pixels to the first answer token, one image and one question, one thread."""
    minutes: float
    """Training and scoring; scoring alone where nothing is trained."""
    commit: str
    """The program's commit, with "+" when the working tree differed."""
    hardware: str
    dtype: str = "bfloat16"
    """The dtype that the weights were trained in; scores are float32's."""
    data: str
    """`evaluation.scenes.benchmark_version()`."""
    start: str
    """Fingerprint of the checkpoint that every run starts from."""
    key: str
    """Hash of all that the figures depend on: setting, seed, steps, images, data, start."""

    def percent(self, group: str) -> float | None:
        """Exact match of a kind or group, 0 to 100; None when nothing of it was asked."""
        tally = self.exact.get(group)
        return tally.percent if tally else None

    @property
    def file_name(self) -> str:
        return f"{self.setting}-seed{self.seed}-{self.split}.json"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Result:
        """Raises InvalidInput naming a field that is missing or unknown."""
        raw: dict[str, Any] = json.loads(text)
        known = {f.name: f for f in dataclasses.fields(cls)}
        for name in raw:
            if name not in known:
                raise InvalidInput("unknown field", field=f"result.{name}")
        for name, spec in known.items():
            optional = spec.default is not dataclasses.MISSING or spec.default_factory is not dataclasses.MISSING
            if name not in raw and not optional:
                raise InvalidInput("is missing", field=f"result.{name}")
        return cls(**{**raw, "exact": {name: Tally(**tally) for name, tally in raw["exact"].items()}})


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure over seeds."""

    mean: float
    standard_error: float | None
    """Standard error of the mean; None with one seed."""
    seeds: int

    def exceeds(self, other: Spread, errors: float = 2.0) -> bool | None:
        """Whether this mean is above the other by more than `errors` standard errors of the difference.

        None where either has one seed, and so no error of its own.
        """
        if self.standard_error is None or other.standard_error is None:
            return None
        return self.mean - other.mean > errors * math.hypot(self.standard_error, other.standard_error)


def spread(values: Sequence[float]) -> Spread:
    """Mean and its standard error. Raises ValueError for no values."""
    if not values:
        raise ValueError("values: a spread needs at least one")
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Spread(mean=statistics.fmean(values), standard_error=error, seeds=len(values))


def of_setting(results: Iterable[Result], setting: str, split: PosterSplit = "test") -> list[Result]:
    """Results of one setting on one split, by seed."""
    return sorted((r for r in results if r.setting == setting and r.split == split), key=lambda r: r.seed)


def save_result(folder: pathlib.Path, result: Result) -> pathlib.Path:
    """Writes the result's file whole or not at all, in place of an older one of the same setting, seed and split."""
    target = folder / RESULTS_FOLDER / result.file_name
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".part")
    with os.fdopen(handle, "w", encoding="utf8") as file:
        file.write(result.to_json())
        file.flush()
        os.fsync(file.fileno())
    os.chmod(name, 0o644)
    os.replace(name, target)
    return target


def load_results(folder: pathlib.Path) -> list[Result]:
    """All results of a study's folder, by file name. Raises InvalidInput naming a file that is none."""
    found = []
    for path in sorted((folder / RESULTS_FOLDER).glob("*.json")):
        try:
            found.append(Result.from_json(path.read_text(encoding="utf8")))
        except (json.JSONDecodeError, InvalidInput, TypeError) as error:
            raise InvalidInput(f"is not a result: {error}", field=str(path)) from None
    return found
