"""A run stops at a loss that is wrong, says when a branch is no longer chosen, and keeps what it measures."""

import dataclasses
import json
import math
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from tests.tiny_training import tiny_run
from training.watching import FIRST_MEAN, PATIENCE, STEPS_FILE, LossGuard, Watch

pytestmark = pytest.mark.usefixtures("one_worker")


def run_of(**changes):
    return dataclasses.replace(tiny_run("o"), **{"steps": 100, **changes})


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_stops_the_run_at_any_step(loss):
    assert f"the loss is {loss}" in LossGuard(run_of()).check(loss)
    assert LossGuard(run_of(max_loss_ratio=0.0)).check(loss)


def test_a_spike_stops_the_run_once_there_is_a_mean_to_compare_with():
    guard = LossGuard(run_of(max_loss_ratio=4.0))
    assert [guard.check(2.0) for _ in range(FIRST_MEAN - 1)] == [""] * (FIRST_MEAN - 1)
    resumed = LossGuard(run_of(max_loss_ratio=4.0))
    resumed.load(guard.state())
    for one in (guard, resumed):
        assert one.check(7.9) == "", "the mean of the first steps says little"
        assert one.check(3.0) == ""
        assert "the loss is 30, above 4 x its running mean 2.63" in one.check(30.0)
    early, careless = LossGuard(run_of(max_loss_ratio=4.0)), LossGuard(run_of(max_loss_ratio=0.0))
    assert early.check(9.0) == careless.check(9.0) == "" and early.check(350.0) == ""
    assert "the loss is 2e+05, above 40 x its running mean 43.1" in early.check(2e5)
    assert careless.check(1e9) == ""


def events(folder):
    """Values of TensorBoard's files, by name: {step: value}."""
    found = {}
    for file in sorted(folder.glob("events.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_means_are_kept_and_each_step_is_written_down(tmp_path, capsys):
    watch = Watch(run_of(name="n"), rank=0, micro_batches=2, start=0, folder=tmp_path)
    for step in range(3):
        measured = [{"visual_tokens": 10.0 * (step > 0), "exact": 0.5}, {"visual_tokens": 30.0 * (step > 0)}]
        watch.add(step, measured, {"loss": 4.0 - step, "rate_projector": 1e-3, "rate_selector": 1e-2}, waited=0.0)
    watch.flush()
    watch.log(3)
    watch.close()
    assert watch.means["loss"] == pytest.approx(0.9 * (0.9 * 4 + 0.1 * 3) + 0.1 * 2)
    assert watch.means["exact"] == 0.5
    assert [json.loads(line)["loss"] for line in (tmp_path / STEPS_FILE).read_text().splitlines()] == [4, 3, 2]
    line = capsys.readouterr().out
    assert line.startswith("n 3/100  loss 3.710  exact 0.500  rate projector 1.00e-03, selector 1.00e-02  ")
    assert all(words in line for words in ("samples/s", "visual tokens/s", "waiting for data", "GiB", "min left"))
    written = events(tmp_path / "tensorboard")
    assert written["train/loss"][3] == pytest.approx(3.71) and written["train/rate_projector"][3] == pytest.approx(1e-3)
    # The first step had text alone: what is told is the mean of the three.
    assert written["speed/visual_tokens"][3] == pytest.approx(written["speed/samples"][3] * 40 / 4 * 2 / 3)
    resumed = Watch(run_of(name="n"), rank=0, micro_batches=2, start=3, folder=None, state=watch.state())
    assert resumed.means == watch.means


def test_a_branch_that_stays_unused_is_a_warning_by_name(capsys):
    watch = Watch(run_of(), rank=0, micro_batches=1, start=0, folder=None)
    for step in range(PATIENCE + 3):
        watch.add(step, [{"branch_0": 0.5, "branch_1": 0.0 if step else 0.005, "branch_2": 0.495}], {"loss": 1.0}, 0.0)
        watch.flush()
        watch.log(step + 1)
        assert ("collapsed selector: branch_1" in capsys.readouterr().out) == (step + 1 == PATIENCE)
