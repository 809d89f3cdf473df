"""Empty and busy regions are found in the pixels, and the shipped model's sampler tells them apart."""

from __future__ import annotations

import pathlib
import sys

import pytest

from evaluation import regions as measured
from evaluation.focus_maps.focus import FocusModel
from evaluation.regions import Region, branch_shares, busiest, regions
from training.data.posters import poster_at

CHECKPOINT = pathlib.Path(__file__).parents[3] / "checkpoints" / "focusllava-tiny"
COARSEST = 2


@pytest.fixture(scope="module")
def found() -> list[Region]:
    model = FocusModel(CHECKPOINT)
    return [region for index in range(8) for region in regions(model, poster_at("test", 2, index))]


def test_the_shipped_model_spends_its_tokens_where_something_is(found: list[Region]) -> None:
    empty, busy = [region for region in found if region.empty], busiest(found)
    assert len(empty) > len(found) / 5 and len(busy) == len(found) // 10
    assert branch_shares(empty, 3)[COARSEST] > 0.8
    assert branch_shares(busy, 3)[0] > 0.8


def test_the_busiest_are_never_empty_and_empty_ones_are_calm(found: list[Region]) -> None:
    assert not any(region.empty for region in busiest(found))
    calm = max(region.busyness for region in found if region.empty)
    assert calm < min(region.busyness for region in busiest(found)) / 4


def test_a_share_of_regions_is_at_least_one() -> None:
    few = [Region(branch=branch, empty=False, busyness=busyness) for branch, busyness in ((0, 1.0), (2, 9.0), (0, 4.0))]
    assert [region.branch for region in busiest(few)] == [2]
    assert branch_shares(few, 3) == pytest.approx([2 / 3, 0, 1 / 3])


def test_the_command_prints_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["regions", str(CHECKPOINT), "--images", "1", "--textured"])
    measured.main()
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "| regions | count | 1x1 % | 2x2 % | 4x4 % |"
    assert [row.split(" | ")[0] for row in rows] == ["| all", "| empty", "| busiest tenth"]
