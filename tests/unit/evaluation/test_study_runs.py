"""The choice of runs that a study starts or skips; runs that train are in tests/integration/test_study.py."""

import dataclasses
import json
import math
import pathlib

import pytest

from evaluation.scenes.scoring import Tally
from evaluation.study.results import FILE_NAME, Result, load_results, of_setting, save_results, spread
from evaluation.study.runs import SPLITS, Study, conduct, expected_minutes, finished, planned, read_history
from evaluation.study.settings import SETTINGS, STUDY
from evaluation.study.tables import settings_of
from services.common.errors import InvalidInput

CHECKPOINT = pathlib.Path(__file__).parents[3] / "checkpoints/focusllava-tiny"


@pytest.fixture
def study(tmp_path):
    return Study(start=CHECKPOINT, folder=tmp_path, scratch=tmp_path / "scratch", seeds=1, cores=1)


def store(study, name, seed=0, **changes):
    """Results of one run, with its keys."""
    run = planned(study, SETTINGS[name], seed, load_results(study.folder))
    for split in SPLITS:
        values = {
            "setting": name, "seed": seed, "split": split, "steps": study.steps, "images": study.images,
            "exact": {"all": Tally(right=3, asked=4)}, "sampled_percent": 40.0, "kept_percent": 30.0,
            "converted_percent": 33.0, "map_percent": 23.5, "branch_shares": {"all": [0.1, 0.2, 0.7]}, "minutes": 4.0,
            "commit": "c", "hardware": "h", **study.versions, "key": run.keys[split], **changes,
        }  # fmt: skip
        save_results(study.folder, [Result(**values)])
    return run


def test_a_result_survives_its_file_and_a_foreign_one_is_named(study):
    store(study, "off", history=[{"step": 10.0, "loss": 0.5}], question_ms=12.5)
    found = load_results(study.folder)
    assert [r.split for r in found] == ["test", "validation"] and found[0].percent("all") == 75
    assert found[0].percent("fine") is None and Result.from_json(found[0].to_json()) == found[0]
    assert [path.name for path in study.folder.iterdir()] == [FILE_NAME]
    path, raw = study.folder / FILE_NAME, json.loads(found[0].to_json())
    # Better scores of the same run stand in the older one's place; the other line is left alone.
    save_results(study.folder, [dataclasses.replace(found[0], minutes=9.0)])
    assert [r.minutes for r in load_results(study.folder)] == [9.0, 4.0]
    without = {name: value for name, value in raw.items() if name != "key"}
    for text, message in (
        (json.dumps({**raw, "extra": 1}), "line 3 .*'extra'"), (json.dumps(without), "line 3 .*'key'"), ("{", "line 3"),
    ):  # fmt: skip
        path.write_text("".join(f"{result.to_json()}\n" for result in found) + text)
        with pytest.raises(InvalidInput, match=message) as error:
            load_results(study.folder)
        assert error.value.field == str(path)


def test_no_budget_starts_nothing(study):
    left = conduct(study, settings_of(2), minutes=0)
    assert left[:2] == ["off, seed 0", "vision, seed 0"] and len(left) == len(settings_of(2))
    assert not study.scratch.exists() and load_results(study.folder) == []


def test_finished_runs_are_skipped_and_changed_ones_are_not(study):
    store(study, "off")
    store(study, "vision")
    settings = [SETTINGS["off"], SETTINGS["vision"]]
    # A budget without end would start whatever is missing.
    assert conduct(study, settings, minutes=math.inf) == []
    for changes in ({"steps": 7}, {"images": 7}, {"seeds": 2}):
        left = conduct(dataclasses.replace(study, **changes), settings, minutes=0)
        assert left == (["off, seed 1", "vision, seed 1"] if "seeds" in changes else ["off, seed 0", "vision, seed 0"])
    store(study, "off", key="of another start")
    assert conduct(study, settings, minutes=0) == ["off, seed 0"]


def test_a_run_waits_for_what_it_is_made_equal_to(study):
    random, permuted = SETTINGS["random_branches"], SETTINGS["permuted_branches"]
    assert planned(study, random, 0, []) is None and planned(study, permuted, 0, []) is None
    vision = store(study, "vision")
    results = load_results(study.folder)
    run = planned(study, random, 0, results)
    assert run.config["stage"]["branch_control"] == {"name": "random", "shares": [0.1, 0.2, 0.7]}
    dealt = planned(study, permuted, 0, results)
    # It takes the weights, and other shares make another run.
    assert dealt.weights == vision.weights and dealt.keys != vision.keys
    store(study, "vision", branch_shares={"all": [0.2, 0.2, 0.6]})
    assert planned(study, random, 0, load_results(study.folder)).keys != run.keys
    # Every seed has its own weights and its own budget.
    assert planned(study, random, 1, results) is None and planned(study, permuted, 1, results) is None
    store(study, "vision", seed=1, branch_shares={"all": [0.3, 0.3, 0.4]})
    other = planned(study, random, 1, load_results(study.folder))
    assert other.config["stage"]["branch_control"]["shares"] == [0.3, 0.3, 0.4]
    assert not finished(study, random, 0, results)


def test_a_learning_rate_that_nothing_has_changes_no_key(study, monkeypatch):
    store(study, "vision")
    names = ("off", "vision", "random_branches", "no_task_gradient", "uniform_max")
    before = {name: planned(study, SETTINGS[name], 0, load_results(study.folder)).keys for name in names}
    monkeypatch.setitem(STUDY["run"]["optimizer"], "selector_lr_scale", 7)
    monkeypatch.setattr("evaluation.study.runs.finished", lambda *_: True)
    after = {name: planned(study, SETTINGS[name], 0, load_results(study.folder)).keys for name in names}
    assert {name for name in names if before[name] != after[name]} == {"vision", "no_task_gradient"}


def test_what_a_run_may_take_is_the_mean_of_those_before(study):
    run = planned(study, SETTINGS["off"], 0, [])
    longer = planned(dataclasses.replace(study, steps=400), SETTINGS["off"], 0, [])
    store(study, "vision", minutes=3.0)
    store(study, "text", minutes=5.0)
    results = load_results(study.folder)
    assert expected_minutes([], run) > 0 and expected_minutes(results, run) == pytest.approx(4.0)
    assert expected_minutes(results, longer) == pytest.approx(8.0)
    assert conduct(study, [SETTINGS["off"]], minutes=3.9) == ["off, seed 0"]


def test_history_is_read_from_the_trainings_own_lines():
    values = "loss 0.523  branch_0 0.140  kept_share 0.700"
    line = f"(RayTrainWorker pid=7) vision-seed0-ab 10/20  {values}  0.80 s/step  1.0 min left"
    again = line.replace("0.523", "0.500")
    last = "vision-seed0-ab 20/20  loss -0.100  0.80 s/step  0.0 min left"
    assert read_history("\n".join(("Ray 2/3 noise", line, "resumed at step 5 of 20", again, last))) == [
        {"step": 10, "loss": 0.5, "branch_0": 0.14, "kept_share": 0.7},
        {"step": 20, "loss": -0.1},
    ]


def test_spread_over_seeds(study):
    several, single = spread([70, 72, 74]), spread([70])
    assert several.mean == 72 and several.standard_error == pytest.approx(2 / math.sqrt(3)) and several.seeds == 3
    assert single.mean == 70 and single.standard_error is None and single.seeds == 1
    with pytest.raises(ValueError, match="values"):
        spread([])
    for seed in (1, 0):
        store(study, "off", seed=seed)
    assert [r.seed for r in of_setting(load_results(study.folder), "off")] == [0, 1]


def test_what_is_only_evaluated_may_change_the_training_that_made_its_weights(study):
    trained = store(study, "off")
    direct = planned(study, SETTINGS["text_direct"], 0, load_results(study.folder))
    assert direct.weights == trained.weights and direct.keys != trained.keys
    assert direct.config["stage"] == {**trained.config["stage"], "model": SETTINGS["text_direct"].stage["model"]}
    other = dataclasses.replace(SETTINGS["text_direct"], stage={})
    assert planned(study, other, 0, load_results(study.folder)).keys != direct.keys
