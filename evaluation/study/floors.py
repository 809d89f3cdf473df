"""The least results that the study is held to, and whether its runs reach them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evaluation.study.results import Result, of_setting, spread
from evaluation.study.settings import LONG, OURS, SETTINGS
from evaluation.study.tables import TABLES, settings_of
from evaluation.study.verdicts import (
    ERRORS,
    SEEDS_FOR_ERROR,
    branch_names,
    collapsed,
    difference_error,
    final_shares,
    mean_of,
    score,
)

NOT_RUN = "not run"


@dataclass(frozen=True, kw_only=True)
class Floor:
    """A least result that the study is held to."""

    what: str
    floor: str
    found: str
    met: bool | None
    """None where too little was run to say."""


def floors(results: Sequence[Result]) -> list[Floor]:
    """The floors that the study's own runs decide."""
    return [check(results) for check in FLOORS]


BOTH = (OURS, *(row.setting for n in (11, 13) for row in TABLES[n].rows if row.setting.startswith(f"{OURS}_")))
"""Ways to train both samplers, of which the one nearest to no sampler on the validation split stands for all."""
MOST_TOKENS, NEAR = 45.0, 1.0


def gaps_on_validation(results: Sequence[Result]) -> dict[str, float]:
    """By how many points each of BOTH is above its model without, where it has no more than MOST_TOKENS."""
    gaps = {}
    for name in BOTH:
        ours, off = (of_setting(results, one, "validation") for one in (name, _without(name)))
        if ours and off and spread([run.converted_percent for run in ours]).mean <= MOST_TOKENS:
            gaps[name] = spread([r.exact["all"].percent for r in ours]).mean - spread(
                [r.exact["all"].percent for r in off]
            ).mean  # fmt: skip
    return gaps


def _without(name: str) -> str:
    return f"off{LONG}" if name.endswith(LONG) else "off"


def _both_near_off(results: Sequence[Result]) -> Floor:
    """Decided by the setting that the validation split chooses; told of others that are near enough on both splits."""
    gaps = gaps_on_validation(results)
    told: list[str] = []
    met: bool | None = None
    for name in sorted(gaps, key=gaps.__getitem__, reverse=True):
        both, off = (score(results, one, "all") for one in (name, _without(name)))
        if not both or not off:
            break
        converted = mean_of(results, name, "converted_percent")
        near = both.mean >= off.mean - NEAR and converted <= MOST_TOKENS
        met = near if met is None else met
        if not told or (near and gaps[name] >= -NEAR):
            told.append(
                f"{SETTINGS[name].title}: {both.mean - off.mean:+.1f} ± {difference_error(both, off):.1f} points at "
                f"{converted:.1f} % of the tokens, seeds: {both.seeds} (validation {gaps[name]:+.1f})"
            )
    return Floor(
        what="both samplers, as chosen on the validation split, against no sampler, trained as long, all questions",
        floor="within 1 point at no more than 45 % of the tokens (converted)",
        found="; near on both splits: ".join(told[:2]) or NOT_RUN,
        met=met,
    )


LEARNED = ("vision", "window_1", *(row.setting for row in TABLES[9].rows if row.setting.startswith("gate_")))
"""Selectors at about equal tokens, of which the best on the validation split stands for all."""
SIMPLE = ("random_branches", "uniform_branches", "uniform_mean", "uniform_max")
MOST_OF_MAP = 50.0
"""Percent. A selector that leaves more is not at equal tokens, as two gates on the base tile's similarity are not."""
SAME_TOKENS_POINTS = 1.0
"""Share of the map, in points, by which the selector may be above a rule that it is held against."""


def best_learned(results: Sequence[Result]) -> str | None:
    """The learned selector with the most fine questions right on the validation split, "vision" where none was scored
    there; None where the one found has no result on the test split. One that hardly compresses is none of them."""
    on_validation = {
        name: spread([run.exact["fine"].percent for run in runs])
        for name in LEARNED
        if (runs := [r for r in of_setting(results, name, "validation") if "fine" in r.exact])
        and spread([run.map_percent for run in runs]).mean <= MOST_OF_MAP
    }
    best = max(on_validation, key=lambda name: on_validation[name].mean, default="vision")
    return best if score(results, best, "fine") else None


def _selector_beats_simple(results: Sequence[Result]) -> Floor:
    best = best_learned(results)
    ours = score(results, best, "fine") if best else None
    found, met = NOT_RUN, None
    if best and ours:
        share, ahead, told = mean_of(results, best, "map_percent"), [], []
        for name in SIMPLE:
            rival = score(results, name, "fine")
            if rival is None:
                told.append(f"{SETTINGS[name].title}: {NOT_RUN}")
                continue
            seeds, rival_share = min(ours.seeds, rival.seeds), mean_of(results, name, "map_percent")
            difference, error = ours.mean - rival.mean, difference_error(ours, rival)
            told.append(
                f"{difference:+.1f} ± {error:.1f} on {SETTINGS[name].title} ({rival_share:.0f} % of the map, "
                f"seeds: {seeds})"
            )
            if seeds >= SEEDS_FOR_ERROR:
                # At more tokens than the rule a lead shows nothing.
                ahead.append(difference > ERRORS * error and share <= rival_share + SAME_TOKENS_POINTS)
        if off := score(results, "off", "fine"):
            told.append(f"{ours.mean - off.mean:+.1f} ± {difference_error(ours, off):.1f} on {SETTINGS['off'].title}")
        met = all(ahead) if len(ahead) == len(SIMPLE) else None
        found = f"{SETTINGS[best].title} ({share:.0f} % of the map): {'; '.join(told)}"
    return Floor(
        what="best learned vision-guided selector against random branches and uniform 2x2, fine questions",
        floor="ahead by more than two standard errors, equal tokens and training, three seeds",
        found=found,
        met=met,
    )


RIVALS = tuple(
    row.setting
    for row in TABLES[1].rows
    if SETTINGS[row.setting].stage.keys() & {"map_rival", "layer_rival"} and not SETTINGS[row.setting].unavailable
)


def _both_beats_rivals(results: Sequence[Result]) -> Floor:
    ours = score(results, OURS, "all")
    scored = {name: rival for name in RIVALS if (rival := score(results, name, "all"))}
    told, met = NOT_RUN, None
    if ours and scored:
        best = max(scored, key=lambda name: scored[name].mean)
        difference = ours.mean - scored[best].mean
        told = f"{difference:+.1f} ± {difference_error(ours, scored[best]):.1f} on {SETTINGS[best].title}"
        missing = [SETTINGS[name].title for name in RIVALS if name not in scored]
        # A rival that was not run may be better.
        met = False if difference <= 0 else (None if missing else True)
        if missing:
            told += f"; {NOT_RUN}: {', '.join(missing)}"
    return Floor(what="both samplers against the best rival at equal tokens, all questions", floor="ahead",
                 found=told, met=met)  # fmt: skip


def _collapse_reproduced(results: Sequence[Result]) -> Floor:
    runs = of_setting(results, "balance_none")
    names = branch_names(SETTINGS["balance_none"])
    told = []
    for run in runs:
        shares = final_shares(run)
        if shares:
            most = max(range(len(shares)), key=shares.__getitem__)
            state = "collapsed to" if collapsed(run) else "not collapsed, most often"
            told.append(f"seed {run.seed} {state} {names[most]} ({100 * shares[most]:.0f} % of the regions)")
    return Floor(
        what="no balance loss: collapse reproduced and detected by name",
        floor="one branch for more than 95 % of the regions",
        found="; ".join(told) or NOT_RUN,
        met=any(collapsed(run) for run in runs) if told else None,
    )


def _one_table_in_time(results: Sequence[Result]) -> Floor:
    """The longest of the tables that were run whole, a seed a setting, with what its rows take their weights from."""
    longest: tuple[float, int] | None = None
    for table in TABLES.values():
        runs = [of_setting(results, setting.name) for setting in settings_of(table.number) if not setting.unavailable]
        if all(runs):
            minutes = sum(spread([run.minutes for run in seeds]).mean for seeds in runs)
            longest = max(longest or (0.0, 0), (minutes, table.number))
    found = "no table was run whole"
    if longest:
        found = f"Table {longest[1]}: {longest[0]:.0f} minutes of runs of one thread, two at once {longest[0] / 2:.0f}"
    return Floor(what="one study table from nothing on 2 cores, a seed a setting", floor="under 3 hours", found=found,
                 met=longest[0] / 2 < 180 if longest else None)  # fmt: skip


FLOORS: tuple[Callable[[Sequence[Result]], Floor], ...] = (
    _both_near_off,
    _selector_beats_simple,
    _both_beats_rivals,
    _collapse_reproduced,
    _one_table_in_time,
)
