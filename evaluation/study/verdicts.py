"""What the results say of each claim that a table makes, and of a selector's collapse."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from evaluation.study.results import Result, Spread, of_setting, spread
from evaluation.study.settings import SETTINGS, Setting
from evaluation.study.tables import TABLES, Claim

Outcome = Literal["agree", "disagree", "too close to call", "not run"]

COLLAPSED_SHARE = 0.95
ERRORS = 2.0
"""Standard errors of a difference from which on it counts."""
SEEDS_FOR_ERROR = 3
"""Fewest seeds whose own error is taken: that of fewer may be small by luck."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A claim held against the results. The figures are None where one of the two was not run."""

    claim: Claim
    tables: tuple[int, ...]
    """The tables that make the claim."""
    outcome: Outcome
    better: Spread | None = None
    worse: Spread | None = None
    difference: float | None = None
    error: float | None = None
    """Standard error of the difference, in points."""
    seeds: int = 0
    """Seeds of the setting with fewer."""


def score(results: Iterable[Result], setting: str, group: str) -> Spread | None:
    """Exact match in percent on the test split, with an error even where one seed was run: that of its questions.

    None where nothing of the group was asked with this setting.
    """
    runs = [run for run in of_setting(results, setting) if run.percent(group) is not None]
    if not runs:
        return None
    over_seeds = spread([run.exact[group].percent for run in runs])
    if over_seeds.seeds >= SEEDS_FOR_ERROR:
        return over_seeds
    share, asked = over_seeds.mean / 100, runs[0].exact[group].asked
    of_questions = 100 * math.sqrt(share * (1 - share) / asked)
    return dataclasses.replace(over_seeds, standard_error=max(of_questions, over_seeds.standard_error or 0.0))


def finding(results: Sequence[Result], claim: Claim, tables: tuple[int, ...] = ()) -> Finding:
    """The claim's outcome by the difference of means against ERRORS standard errors of it."""
    better, worse = (score(results, name, claim.group) for name in (claim.better, claim.worse))
    if better is None or worse is None:
        return Finding(claim=claim, tables=tables, outcome="not run", better=better, worse=worse)
    error = math.hypot(better.standard_error or 0.0, worse.standard_error or 0.0)
    difference = better.mean - worse.mean
    outcome: Outcome = "too close to call"
    if abs(difference) > ERRORS * error:
        outcome = "agree" if difference > 0 else "disagree"
    return Finding(claim=claim, tables=tables, outcome=outcome, better=better, worse=worse, difference=difference,
                   error=error, seeds=min(better.seeds, worse.seeds))  # fmt: skip


def findings(results: Sequence[Result]) -> list[Finding]:
    """One a claim; what several tables claim is said once."""
    tables: dict[Claim, list[int]] = {}
    for table in TABLES.values():
        for claim in table.claims:
            tables.setdefault(claim, []).append(table.number)
    return [finding(results, claim, tuple(numbers)) for claim, numbers in tables.items()]


def collapsed(result: Result) -> bool:
    """Whether the selector ended up choosing one branch for more than 95 % of the regions."""
    return max(final_shares(result), default=0.0) > COLLAPSED_SHARE


def final_shares(result: Result) -> list[float]:
    """Share of the regions at each branch as scored, else at the last step of training; empty without a selector."""
    if result.branch_shares.get("all"):
        return result.branch_shares["all"]
    return branch_columns(result.history[-1]) if result.history else []


def branch_columns(line: dict[str, float]) -> list[float]:
    """branch_0, branch_1, ... of a line of the training log; empty where it has none."""
    return [line[f"branch_{branch}"] for branch in range(sum(name.startswith("branch_") for name in line))]


def has_selector(setting: Setting) -> bool:
    """Whether branches are chosen by a selector that is trained on the task; a control's are not."""
    return bool(setting.stage.get("vision_sampler")) and "branch_control" not in setting.stage


def branch_names(setting: Setting) -> list[str]:
    """Pooling of each branch, such as "2x2"; empty without a vision-guided sampler."""
    if setting.weights_of in SETTINGS:
        return branch_names(SETTINGS[setting.weights_of])
    sampler = setting.stage.get("model", {}).get("vision_sampler", {})
    return [f"{height}x{width}" if height else "dropped" for height, width in sampler.get("branches", ())]


def mean_of(results: Sequence[Result], setting: str, name: str) -> float:
    """Mean over seeds of one of Result's percentages on the test split."""
    return spread([getattr(run, name) for run in of_setting(results, setting)]).mean
