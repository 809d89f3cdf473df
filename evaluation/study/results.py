"""What each run of the study found, a line of JSON each, and the spread over seeds."""

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

from evaluation.scenes.scoring import Tally
from services.common.errors import InvalidInput
from training.data.pairs import PosterSplit

FILE_NAME = "results.jsonl"
"""The file in the study's folder."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What scoring a run on one split finds. Percentages run from 0 to 100."""

    exact: dict[str, Tally]
    """Exact match by kind of question, by group ("fine", "coarse") and over "all"."""
    sampled_percent: float
    """Visual tokens that enter the language model, of the uncompressed ones; base tile and newlines count."""
    kept_percent: float
    """Visual tokens left in its last layer, after the text-guided sampler or a rival inside the model."""
    converted_percent: float
    """Visual tokens averaged over its layers: the paper's converted remaining tokens (Sec. 4.4)."""
    map_percent: float
    """Tokens that come out of the feature map, base tile and newlines apart, of the map's."""
    branch_shares: dict[str, list[float]] = field(default_factory=dict)
    """Share of regions that use each branch: of "all", and of those with a "glyph" (or a bar), else a "shape", else a
    "distractor", else the rest of a "panel" (card, chart or table), or "empty". No entries without a vision-guided
    sampler."""
    question_ms: float | None = None
    """Median time from pixels to the first answer token, one image and one question, one thread."""


@dataclass(frozen=True, kw_only=True)
class Result(Scores):
    """The scores of one setting, trained with one seed, on one split."""

    setting: str
    """Name in `evaluation.study.settings.SETTINGS`."""
    seed: int
    split: PosterSplit
    """Settings are chosen on "validation" and reported on "test"."""
    steps: int
    """Training steps; what is only evaluated has those of the weights that it takes."""
    images: int
    """Images scored."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Lines of the training log: step, loss, exact (share of questions), branch_0, branch_1, ..., sampled_share (of
    the uncompressed tokens), kept_share (of those that entered the model); running means over some ten steps."""
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

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Result:
        """Raises ValueError or TypeError for what is no result; the latter names a field that is missing or unknown."""
        raw = json.loads(text)
        return cls(**{**raw, "exact": {name: Tally(**tally) for name, tally in raw.get("exact", {}).items()}})


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure over seeds."""

    mean: float
    standard_error: float | None
    """Standard error of the mean; None with one seed."""
    seeds: int


def spread(values: Sequence[float]) -> Spread:
    """Mean and its standard error. Raises ValueError for no values."""
    if not values:
        raise ValueError("values: a spread needs at least one")
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Spread(mean=statistics.fmean(values), standard_error=error, seeds=len(values))


def of_setting(results: Iterable[Result], setting: str, split: PosterSplit = "test") -> list[Result]:
    """Results of one setting on one split, by seed."""
    return sorted((r for r in results if r.setting == setting and r.split == split), key=lambda r: r.seed)


def save_results(folder: pathlib.Path, results: Iterable[Result]) -> None:
    """Puts results into the folder's file, in place of older ones of the same setting, seed and split.

    The file is written whole or not at all, its lines in the order of setting, seed and split.
    """
    merged = {(one.setting, one.seed, one.split): one for one in (*load_results(folder), *results)}
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, suffix=".part")
    with os.fdopen(handle, "w", encoding="utf8") as file:
        file.writelines(one.to_json() + "\n" for _, one in sorted(merged.items(), key=lambda item: item[0]))
        file.flush()
        os.fsync(file.fileno())
    os.chmod(name, 0o644)
    os.replace(name, folder / FILE_NAME)


def load_results(folder: pathlib.Path) -> list[Result]:
    """All results of a study's folder, as its file has them. Raises InvalidInput naming a line that is none."""
    path, found = folder / FILE_NAME, []
    for number, line in enumerate(path.read_text("utf8").splitlines() if path.exists() else (), start=1):
        try:
            found.append(Result.from_json(line))
        except (ValueError, TypeError, AttributeError) as error:
            raise InvalidInput(f"line {number} is not a result: {error}", field=str(path)) from None
    return found
