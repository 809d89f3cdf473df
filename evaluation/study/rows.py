"""What a table of the study is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Source = Literal["paper", "expected"]
"""Who says so: the paper's table, or the trials that this study follows up."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A setting in a table."""

    setting: str
    label: str
    """The paper's, or ours for a row that it does not have."""
    paper: Mapping[str, float] = field(default_factory=dict)
    """The paper's figures by column; what it does not report is left out."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """`better` scores above `worse` on a group of questions."""

    better: str
    worse: str
    group: Literal["all", "fine", "coarse"]
    source: Source = "paper"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the paper, or one of the study's own: 9 to 13."""

    number: int
    title: str
    compared: str
    """What differs between the rows, and how they were made comparable."""
    columns: tuple[str, ...]
    """The paper's; token shares in percent, Speed in the paper's unit."""
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]


CONTROLS = (
    Row(setting="random", label="random tokens"),
    Row(setting="uniform_mean", label="uniform 2x2, average"),
    Row(setting="uniform_max", label="uniform 2x2, max"),
)
"""In every table: simple rules that many published ones do not beat."""
