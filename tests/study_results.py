"""Results of runs that were never made, for tests of what the study says of them."""

from __future__ import annotations

from dataclasses import replace

from evaluation.scenes.scoring import Tally
from evaluation.study.results import Result

EVEN = [0.34, 0.33, 0.33]


def result(setting: str, percent: float, seed: int = 0, **changes: object) -> Result:
    """A run with the same score in all groups, on a thousand questions each."""
    tally = Tally(right=round(10 * percent), asked=1000)
    made = Result(
        setting=setting,
        seed=seed,
        split="test",
        steps=321,
        images=77,
        exact={group: tally for group in ("all", "fine", "coarse", "number")},
        sampled_percent=41.3,
        kept_percent=29.7,
        converted_percent=33.9,
        map_percent=23.4,
        minutes=3.0,
        commit="0123456789ab+",
        hardware="a processor, 2 cores",
        data="fedcba987654",
        start="c0ffee" * 8,
        key="k",
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def seeds(setting: str, *percents: float, **changes: object) -> list[Result]:
    return [result(setting, percent, seed, **changes) for seed, percent in enumerate(percents)]


def selector(setting: str, percent: float, seed: int = 0, end: list[float] | None = None) -> Result:
    """A run with a vision-guided sampler that starts even and ends at these shares."""
    end = end or [0.17, 0.2, 0.63]
    history = [
        {"step": float(step), "loss": 1.0, **{f"branch_{branch}": share for branch, share in enumerate(shares)}}
        for step, shares in ((10, EVEN), (20, end))
    ]
    kinds = {"all": end, "glyph": [0.91, 0.06, 0.03], "empty": [0.0, 0.12, 0.88]}
    return result(setting, percent, seed, branch_shares=kinds, history=history)
