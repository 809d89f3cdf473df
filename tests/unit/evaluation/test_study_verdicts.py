"""What results say of a claim and of a selector's collapse: it follows the numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from evaluation.study.tables import TABLES, Claim
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
