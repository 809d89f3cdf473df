"""What a killed run leaves behind is put in order, and a run is gone on with by its own kind alone."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch

from services.common.errors import InvalidInput
from tests.tiny_training import tiny_run
from training import checkpoints


def a_run(folder, *steps, listed):
    for step in steps:
        (folder / checkpoints.name_of(step)).mkdir(parents=True)
    results = [{"checkpoint_dir_name": checkpoints.name_of(step), "metrics": {}} for step in listed]
    written = {
        "ray_version": "2",
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(results))),
        "latest_checkpoint_result": results[-1],
    }
    (folder / checkpoints.LIST).write_text(json.dumps(written))


def steps_of(folder):
    return [int(path.name.removeprefix(checkpoints.PREFIX)) for path in sorted(folder.glob("checkpoint_0*"))]


def test_checkpoints_that_never_were_whole_are_removed(tmp_path):
    a_run(tmp_path, 10, 20, 30, listed=[10, 20])
    assert checkpoints.clean(tmp_path) == ["checkpoint_00000030 was not whole, removed"]
    assert steps_of(tmp_path) == [10, 20] and checkpoints.clean(tmp_path) == []
    assert [path.name for path in checkpoints.whole(tmp_path)] == [checkpoints.name_of(10), checkpoints.name_of(20)]
    assert checkpoints.clean(tmp_path / "new") == []


@pytest.mark.parametrize("torn", ["", '{"ray_version": "2.60.0", "checkpoint_res'])
def test_a_torn_list_is_replaced_by_its_copy_without_what_ray_has_deleted_since(tmp_path, torn):
    a_run(tmp_path, 20, 30, listed=[10, 20])
    checkpoints.copy_list(tmp_path)
    (tmp_path / checkpoints.LIST).write_text(torn)
    checkpoints.copy_list(tmp_path)  # a torn one never takes a good copy's place
    mended, removed = checkpoints.clean(tmp_path)
    assert "was torn" in mended and "checkpoint_00000030" in removed
    assert steps_of(tmp_path) == [20] == [int(path.name[-2:]) for path in checkpoints.whole(tmp_path)]
    listed = json.loads((tmp_path / checkpoints.LIST).read_text())
    assert listed["latest_checkpoint_result"]["checkpoint_dir_name"] == checkpoints.name_of(20)
    assert listed["checkpoint_report_indices"] == [1]


def test_a_torn_list_without_a_copy_starts_anew(tmp_path):
    a_run(tmp_path, 10, listed=[10])
    (tmp_path / checkpoints.LIST).write_text("{")
    assert len(checkpoints.clean(tmp_path)) == 2
    assert steps_of(tmp_path) == [] and not (tmp_path / checkpoints.LIST).exists()


def test_another_number_of_workers_is_refused_in_zero_3_with_what_to_do():
    checkpoints.check_workers("n", 2, 2, zero_stage=3)
    checkpoints.check_workers("n", 2, 4, zero_stage=2)
    with pytest.raises(InvalidInput, match="is 4, .* sharded over 2: go on with cluster.workers=2, or"):
        checkpoints.check_workers("n", 2, 4, zero_stage=3)


def test_edited_data_is_another_run_and_faster_reading_is_not():
    made_of = checkpoints.what_it_is_made_of
    before = {**made_of(tiny_run("o")), "data": "a1"}
    slower = {"processes": 8, "prefetch": 9, "gradient_checkpointing": True, "validation": {"data": "x.json"}}
    checkpoints.check_resumed("n", before, {**made_of(tiny_run("o", stage=slower)), "data": "a1"})
    with pytest.raises(InvalidInput, match="the name 'n': data was 'a1', is 'b2'"):
        checkpoints.check_resumed("n", before, {**before, "data": "b2"})


def test_random_states_go_on_where_they_were():
    def draws():
        return torch.rand(1).item(), random.random(), np.random.rand()

    state = checkpoints.random_state()
    first = draws()
    checkpoints.set_random_state(state)
    assert draws() == first


def test_what_killed_workers_left_in_a_machines_own_folder_goes_with_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run, other = (dataclasses.replace(tiny_run("o"), name=name) for name in ("a", "a-b"))
    left, kept = checkpoints.scratch(run), checkpoints.scratch(other)
    checkpoints.scratch_of_all(run).mkdir()
    checkpoints.clean_scratch(run)
    assert list(tmp_path.iterdir()) == [kept] and not left.exists()
