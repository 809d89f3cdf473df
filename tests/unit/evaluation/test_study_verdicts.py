"""What results say of a claim, of a selector's collapse, and of the floors: it follows the numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from evaluation.study.floors import Floor, best_learned, floors
from evaluation.study.results import Result
from evaluation.study.rows import Claim
from evaluation.study.tables import TABLES
from evaluation.study.verdicts import collapsed, finding, findings, score
from tests.study_results import result, seeds, selector


@pytest.mark.parametrize(
    ("better", "worse", "outcome"),
    [
        ((80.0, 80.4, 80.8), (78.0, 78.4, 78.8), "agree"),
        ((78.0, 78.4, 78.8), (80.0, 80.4, 80.8), "disagree"),
        ((80.0, 80.4, 80.8), (79.7, 80.1, 80.5), "too close to call"),
        # One seed each: the questions' own sampling error is 1.26 and 1.31 points.
        ((80.0,), (77.0,), "too close to call"),
        ((80.0,), (76.0,), "agree"),
        # Two seeds that happen to agree are no proof.
        ((80.0, 80.0), (79.0, 79.0), "too close to call"),
        ((80.0, 80.0, 80.0), (79.0, 79.0, 79.0), "agree"),
        ((), (79.0,), "not run"),
    ],
)
def test_outcome_by_two_standard_errors(better: tuple[float, ...], worse: tuple[float, ...], outcome: str) -> None:
    results = [*seeds("both", *better), *seeds("off", *worse)]
    found = finding(results, Claim(better="both", worse="off", group="fine"))
    assert found.outcome == outcome
    assert found.seeds == min(len(better), len(worse))


def test_only_the_test_split_is_reported() -> None:
    results = [result("both", 90.0, split="validation"), result("both", 50.0)]
    found = score(results, "both", "all")
    assert found is not None and found.mean == 50.0 and found.seeds == 1
    assert score([results[0]], "both", "all") is None


def test_a_claim_of_two_tables_is_said_once() -> None:
    found = findings([])
    assert len({one.claim for one in found}) == len(found)
    assert sum(len(one.tables) for one in found) == sum(len(set(table.claims)) for table in TABLES.values())
    assert all(one.outcome == "not run" for one in found)


def test_collapse_is_one_branch_for_nearly_all_regions() -> None:
    assert collapsed(selector("balance_none", 50.0, end=[0.01, 0.03, 0.96]))
    assert not collapsed(selector("balance_none", 50.0, end=[0.02, 0.03, 0.95]))
    assert not collapsed(result("off", 50.0))
    # Where regions were not counted, the log's last line decides.
    run = selector("balance_none", 50.0, end=[0.0, 1.0, 0.0])
    assert collapsed(replace(run, branch_shares={}))
    assert not collapsed(replace(run, branch_shares={}, history=run.history[:1]))


def floor_on(results: list[Result], words: str) -> Floor:
    (found,) = [floor for floor in floors(results) if words in floor.what]
    return found


def test_floors_follow_the_numbers() -> None:
    near = "both samplers, as chosen"
    full = {"converted_percent": 100.0}
    short, long = (
        [result(name, percent, split=split, **full) for split in ("validation", "test")]
        for name, percent in (("off", 80.0), ("off_long", 82.0))
    )

    def ours(name: str, validation: float, test: float, **changes: object) -> list[Result]:
        return [result(name, validation, split="validation", **changes), result(name, test, **changes)]

    assert floor_on([], near).met is None
    assert floor_on([*short, result("both", 79.5)], near).met is None, "nothing was chosen"
    assert floor_on([*short, *ours("both", 79.0, 79.5)], near).met
    assert not floor_on([*short, *ours("both", 79.0, 78.5)], near).met
    assert floor_on([*short, *ours("both", 85.0, 85.0, converted_percent=46.0)], near).met is None
    # Chosen by the validation split, whatever the test split says.
    both = [*short, *long, *ours("both", 79.0, 80.0), *ours("both_held_long", 81.5, 80.5)]
    assert not floor_on(both, near).met and "held at 66 %" in floor_on(both, near).found
    assert floor_on([*both, *ours("both_set_long", 81.6, 81.5)], near).met

    simple = [run for name in ("random_branches", "uniform_branches", "uniform_mean", "uniform_max")
              for run in seeds(name, 70.0, 71.0, 72.0)]  # fmt: skip
    ahead = "best learned"
    assert floor_on([*simple, *seeds("vision", 75.0, 76.0, 77.0)], ahead).met
    assert floor_on([*simple, *seeds("vision", 71.0, 72.0, 73.0)], ahead).met is False
    # Too few seeds, or a rule not run: nothing is decided; more tokens than the rule: nothing is won.
    assert floor_on([*simple, *seeds("vision", 75.0, 76.0)], ahead).met is None
    assert floor_on([*simple[:-3], *seeds("vision", 75.0, 76.0, 77.0)], ahead).met is None
    assert floor_on([*simple, *seeds("vision", 75.0, 76.0, 77.0, map_percent=30.0)], ahead).met is False

    names = {row.setting for row in TABLES[1].rows} - {"off", "both", "vision", "trim", "uniform_max"}
    rivals = [result(name, 70.0) for name in sorted(names)]
    assert floor_on([*rivals, result("both", 75.0)], "best rival").met is None
    assert floor_on([*rivals, result("uniform_max", 74.0), result("both", 75.0)], "best rival").met
    assert floor_on([result("fastv", 76.0), result("both", 75.0)], "best rival").met is False

    table = [result(row.setting, 50.0, minutes=10.0) for row in TABLES[3].rows]
    assert floor_on(table, "2 cores").met and "Table 3" in floor_on(table, "2 cores").found
    assert not floor_on([replace(run, minutes=100.0) for run in table], "2 cores").met


def test_the_best_selector_is_chosen_on_the_validation_split() -> None:
    results = [result("vision", 90.0), result("gate_paper_region", 40.0)]
    results += [result("vision", 60.0, split="validation"), result("gate_paper_region", 61.0, split="validation")]
    assert best_learned(results) == "gate_paper_region"
    assert best_learned(results[:1]) == "vision"
    assert best_learned(results[2:]) is None
    whole = [result("gate_paper_base_tile", 95.0, split=split, map_percent=97.0) for split in ("validation", "test")]
    assert best_learned([*results, *whole]) == "gate_paper_region", "it leaves nothing out"
