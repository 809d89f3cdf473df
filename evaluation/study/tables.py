"""What the study compares: all tables by number, and which settings a table or figure needs."""

from __future__ import annotations

from evaluation.study.own_tables import OWN_TABLES
from evaluation.study.paper_tables import PAPER_TABLES
from evaluation.study.rows import Table
from evaluation.study.settings import OURS, SETTINGS, Setting
from services.common.errors import InvalidInput

TABLES: dict[int, Table] = {table.number: table for table in (*PAPER_TABLES, *OWN_TABLES)}

FIGURES: dict[int, tuple[str, ...]] = {
    2: ("off", "text_layer_1", "text_layer_2", "text", "text_layer_4", "text_layer_5"),
    3: ("vision",),
    **{number: (OURS,) for number in range(4, 11)},
}
"""Settings that a figure of the paper shows."""


def settings_of(table: int | None = None, figure: int | None = None) -> list[Setting]:
    """Settings of a table or figure, or all when neither is named, in a runnable order: needed ones stand first.

    Without a table or figure the gate's come first, then the two samplers and their rivals, then the rest. Settings
    that cannot run are left out. Raises InvalidInput for a number that the paper and this study do not have.
    """
    if table is not None and table not in TABLES:
        raise InvalidInput(f"is {table}, expected 1..{max(TABLES)}", field="table")
    if figure is not None and figure not in FIGURES:
        raise InvalidInput(f"is {figure}, expected {min(FIGURES)}..{max(FIGURES)}", field="figure")
    if table is None and figure is None:
        names = [row.setting for number in (9, 2, 1, 10, 13, 11, *range(3, 9), 12) for row in TABLES[number].rows]
        names += [name for number in FIGURES for name in FIGURES[number]]
    else:
        names = [row.setting for row in TABLES[table].rows] if table is not None else []
        names += FIGURES[figure] if figure is not None else ()
    ordered: dict[str, Setting] = {}
    for name in names:
        _add(ordered, SETTINGS[name])
    return [setting for setting in ordered.values() if not setting.unavailable]


def _add(ordered: dict[str, Setting], setting: Setting) -> None:
    for name in setting.needs:
        _add(ordered, SETTINGS[name])
    ordered.setdefault(setting.name, setting)
