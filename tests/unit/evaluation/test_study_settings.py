"""The study's settings: all of them can be trained, every table has its controls, every rival its row."""

import pathlib

import pytest

from evaluation.study.evaluate import Job
from evaluation.study.runs import Study, run_config
from evaluation.study.settings import LEAST_LAYER_BUDGET, SETTINGS, coefficients, resolved
from evaluation.study.tables import FIGURES, TABLES, settings_of
from services.common.errors import InvalidInput
from services.common.settings import build_settings
from training.config import RunConfig
from training.experiments.rivals.registry import LAYER_RIVALS, MAP_RIVALS
from training.experiments.task import ExperimentTask

CHECKPOINT = pathlib.Path(__file__).parents[3] / "checkpoints/focusllava-tiny"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return Study(start=CHECKPOINT, folder=folder, scratch=folder / "scratch")


@pytest.mark.parametrize("setting", [s for s in settings_of() if s.train], ids=lambda s: s.name)
def test_a_setting_builds_into_what_it_says(study, setting):
    setting = resolved(setting, (0.2, 0.3, 0.5), 30.0) if setting.match else setting
    run = build_settings(RunConfig, run_config(study, setting, 0))
    task = ExperimentTask(run)
    model, stage = task.module, setting.stage
    assert (model.map_rival is not None, model.layer_rival is not None) == (
        "map_rival" in stage,
        "layer_rival" in stage,
    )
    assert task.stage.vision_sampler == stage.get("vision_sampler", False)
    assert (model.schedule is not None) == ("prune" in stage)
    assert task.data.source.glyph_boxes is not None
    for name, value in stage.get("model", {}).get("text_sampler", {}).items():
        assert getattr(task.config.text_sampler, name) == value
        if name == "instruction":
            assert task.builder.renderer.instruction == value
    if "vision_sampler" in stage.get("model", {}):
        wanted, found = stage["model"]["vision_sampler"], task.config.vision_sampler
        assert (found.window, found.probability_gate, found.selector_input, len(found.branches)) == (
            wanted["window"], wanted["probability_gate"], wanted["selector_input"], len(wanted["branches"])
        )  # fmt: skip
        # Nothing of what the start's selector knows.
        assert not model.model.encoder.vision_guided_sampler.selector.linear.weight.any()
    if stage.get("map_rival", {}).get("name") == "random":
        assert (model.map_rival.budget, model.map_rival.newline_rows) == (0.25, 4)
    assert (model.branch_control is not None) == ("branch_control" in stage)
    selector = model.model.encoder.vision_guided_sampler.selector.linear.weight
    assert setting.selects == (task.stage.vision_sampler and selector.requires_grad)


def test_every_table_has_random_and_uniform_and_every_rival_a_row():
    for table in TABLES.values():
        names = set(table.settings)
        assert {"random", "uniform_mean", "uniform_max"} <= names, table.number
        assert all(claim.better in names and claim.worse in names for claim in table.claims), table.number
        assert all(column in table.columns for row in table.rows for column in row.paper), table.number
        assert {row.label for row in table.rows if not row.setting} == {
            row.label for row in table.rows if row.cannot_run
        }
    assert {*MAP_RIVALS, *LAYER_RIVALS} <= {row.setting for row in TABLES[1].rows}
    assert {name for names in FIGURES.values() for name in names} <= set(SETTINGS)


def test_what_another_needs_stands_first():
    for number in (None, *TABLES):
        names = [setting.name for setting in settings_of(number)]
        assert len(names) == len(set(names))
        for position, name in enumerate(names):
            assert all(names.index(needed) < position for needed in SETTINGS[name].needs)
    assert [setting.name for setting in settings_of()][:2] == ["off", "vision"]
    with pytest.raises(InvalidInput, match="table"):
        settings_of(max(TABLES) + 1)


def test_a_match_fills_in_budgets_and_shares():
    assert resolved(SETTINGS["fastv"], (), 31.0).stage["layer_rival"]["budget"] == 0.31
    assert resolved(SETTINGS["fastv"], (), 15.0).stage["layer_rival"]["budget"] == LEAST_LAYER_BUDGET
    assert "budget" not in SETTINGS["fastv"].stage["layer_rival"]
    branches = resolved(SETTINGS["random_branches"], (0.1, 0.2, 0.7), 31.0)
    assert branches.stage["branch_control"]["shares"] == [0.1, 0.2, 0.7]
    assert resolved(SETTINGS["uniform_max"], (), 99.0).stage["map_rival"]["budget"] == 0.25


def test_coefficients_level_the_loss_at_the_shares():
    shares = (0.14, 0.2, 0.66)
    cost = [c * share for c, share in zip(coefficients(shares), shares, strict=True)]
    assert cost == pytest.approx([cost[0]] * 3, rel=1e-3) and sum(coefficients(shares)) == pytest.approx(3, abs=1e-3)


@pytest.mark.parametrize("name", ["both", "permuted_branches", "fastv"])
def test_a_job_survives_its_file(name):
    job = Job(setting=SETTINGS[name], config={"steps": 1}, weights="start", splits=("validation", "test"), images=3)
    assert Job.from_json(job.to_json()) == job
