"""What the study compares: the tables of study.yaml, the paper's figures, and the settings that each needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from evaluation.study.settings import OURS, SETTINGS, STUDY, Setting
from services.common.errors import InvalidInput

Source = Literal["paper", "expected"]
"""Who makes a claim: the paper's table, or the trials that this study follows up."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A setting in a table."""

    setting: str
    """Empty where none of ours can stand in the row."""
    label: str
    """The paper's, or ours for a row that it does not have."""
    paper: Mapping[str, float] = field(default_factory=dict)
    """The paper's figures by column; what it does not report is left out."""
    cannot_run: str = ""
    """Why no setting of ours can stand in the row."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The statement that `better` scores above `worse` on a group of questions."""

    better: str
    worse: str
    group: str
    """"all", "fine" or "coarse"."""
    source: Source = "paper"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the paper, or one of the study's own: 9 and 10."""

    number: int
    title: str
    compared: str
    """What differs between the rows, and how they were made comparable."""
    columns: tuple[str, ...]
    """The paper's."""
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]

    @property
    def settings(self) -> list[str]:
        return [row.setting for row in self.rows if row.setting]


def _table(raw: Mapping[str, Any], controls: list[list[Any]]) -> Table:
    columns, why = tuple(raw.get("columns", ())), raw.get("cannot_run", {})
    rows = []
    for setting, label, *figures in raw["rows"] + controls:
        paper = {name: figure for name, figure in zip(columns, figures, strict=False) if figure is not None}
        rows.append(Row(setting=setting, label=label, paper=paper, cannot_run=why.get(label, "")))
    claims = []
    for source, texts in raw["claims"].items():
        for better, _, worse, _, group in map(str.split, texts):
            claims.append(Claim(better=better, worse=worse, group=group, source=source))
    return Table(number=raw["number"], title=raw["title"], compared=raw["compared"], columns=columns,
                 rows=tuple(rows), claims=tuple(claims))  # fmt: skip


TABLES: dict[int, Table] = {raw["number"]: _table(raw, STUDY["controls"]) for raw in STUDY["tables"]}
FIGURES: dict[int, tuple[str, ...]] = {
    2: ("off", "text_layer_1", "text_layer_2", "text", "text_layer_4", "text_layer_5"),
    3: ("vision",),
    **{number: (OURS,) for number in range(4, 11)},
}
"""Settings that a figure of the paper shows."""


def settings_of(table: int | None = None, figure: int | None = None) -> list[Setting]:
    """The settings of a table or figure, of all when neither is named. What another needs stands before it.

    Without a table or figure the gate's come first, then the two samplers and their rivals, then the rest. Raises
    InvalidInput for a number that the paper and this study do not have.
    """
    for name, number, known in (("table", table, TABLES), ("figure", figure, FIGURES)):
        if number is not None and number not in known:
            raise InvalidInput(f"is {number}, expected {min(known)}..{max(known)}", field=name)
    tables = (9, 2, 1, 10, *range(3, 9)) if table is None and figure is None else (table,) if table else ()
    figures = tuple(FIGURES) if table is None and figure is None else (figure,) if figure else ()
    names = [name for number in tables for name in TABLES[number].settings]
    return list(_ordered([*names, *(name for number in figures for name in FIGURES[number])]).values())


def _ordered(names: Iterable[str]) -> dict[str, Setting]:
    found: dict[str, Setting] = {}
    for name in names:
        found |= {**_ordered(SETTINGS[name].needs), name: SETTINGS[name]} if name not in found else {}
    return found
