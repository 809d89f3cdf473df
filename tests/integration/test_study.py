"""A study of two steps a run, from start to page: trained by Ray and DeepSpeed, matched, scored, resumed."""

import dataclasses
import math

import pytest
import torch

from evaluation.study.results import FILE_NAME, load_results
from evaluation.study.runs import Study, conduct, weights_of
from evaluation.study.settings import SETTINGS
from tests.tiny_training import tiny_run
from training.question_stage import QuestionTask

NAMES = ("vision", "random_branches", "permuted_branches")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    torch.manual_seed(0)
    QuestionTask(tiny_run(str(folder))).export(folder / "start")
    # On two cores one run is scored while another, which does not need its result, is trained.
    return Study(start=folder / "start", folder=folder / "page", scratch=folder / "scratch", seeds=1, steps=2,
                 images=3, cores=2)  # fmt: skip


def test_runs_train_score_and_resume(study):
    settings = [SETTINGS[name] for name in NAMES]
    assert conduct(study, settings, minutes=math.inf) == []
    results = {(r.setting, r.split): r for r in load_results(study.folder)}
    assert set(results) == {(name, split) for name in NAMES for split in ("validation", "test")}
    vision, random = results["vision", "validation"], results["random_branches", "test"]
    assert vision.history[-1]["step"] == 2 and {"loss", "exact", "branch_0", "sampled_share"} <= set(vision.history[-1])
    assert vision.exact["all"].asked == vision.exact["fine"].asked + vision.exact["coarse"].asked > 0
    assert random.history and results["permuted_branches", "test"].history == []
    assert results["permuted_branches", "test"].map_percent == results["vision", "test"].map_percent
    assert vision.start == study.versions["start"] and vision.minutes > 0 and vision.question_ms > 0
    assert weights_of(study, SETTINGS["vision"], 0, list(results.values())).is_relative_to(study.scratch)

    written = set((study.folder / FILE_NAME).read_text("utf8").splitlines())
    assert conduct(study, settings, minutes=math.inf) == []
    # The same weights, scored on fewer images: nothing is trained again.
    assert conduct(dataclasses.replace(study, images=2), settings[:1], minutes=math.inf) == []
    changed = [r for r in load_results(study.folder) if r.to_json() not in written]
    assert [(r.setting, r.split, r.images) for r in changed] == [("vision", "test", 2), ("vision", "validation", 2)]
    assert next((study.scratch / "logs").glob("vision-seed0-*.log")).read_text().count("exported to") == 1
