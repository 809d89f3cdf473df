"""The study's scores are those of the served engine, question by question and token by token."""

import dataclasses
import pathlib
import random

import pytest
import torch

from evaluation.scenes import benchmark_images
from evaluation.score import SAMPLERS, answers
from evaluation.study.evaluate import benchmark_samples, evaluate, schedule_of, trained_task
from evaluation.study.runs import Study, run_config
from evaluation.study.settings import SETTINGS
from services.local.model import LocalModel

CHECKPOINT = pathlib.Path(__file__).parents[3] / "checkpoints/focusllava-tiny"
IMAGES = 3


def task_of(name, folder):
    study = Study(start=CHECKPOINT, folder=folder, scratch=folder)
    config = run_config(study, SETTINGS[name], 0)
    # The shipped checkpoint's own sampler, whatever the setting trains.
    config["stage"] = {**config["stage"], "model": {}}
    return trained_task(config, str(CHECKPOINT))


@pytest.mark.parametrize("name", ["off", "both"])
def test_scores_are_the_served_engines(tmp_path, name):
    setting, task = SETTINGS[name], task_of(name, tmp_path)
    if setting.text:  # a request may say its threshold, its layer is the checkpoint's
        setting = dataclasses.replace(setting, text=(task.config.text_sampler.layer, setting.text[1]))
    module = task.module.eval()
    module.schedule = schedule_of(setting)
    served = LocalModel(CHECKPOINT, "cpu", "float32")
    served_right = served_converted = served_full = kept = 0.0
    for asked, (file, questions) in zip(
        benchmark_samples(task, "test", IMAGES), benchmark_images("test", IMAGES), strict=True
    ):
        assert asked.questions == questions
        ours = module.answer([asked.sample], random.Random(0))
        (tokens,) = served.encode([file], vision_sampler=SAMPLERS[name]["vision_sampler"])
        torch.testing.assert_close(ours.encoded[0].tokens_ND, tokens.tokens_ND, rtol=1e-3, atol=1e-3)
        threshold = setting.text[1] if setting.text else None
        for q, answer in enumerate(answers(served, file, questions, SAMPLERS[name], threshold)):
            text, usage = answer.text.strip(), answer.usage
            assert bool(ours.exact_Q[q]) == (text == questions[q].answer)
            seen_L = ours.tokens_QL[q]
            assert (int(seen_L[0]), int(seen_L[-1])) == (usage.visual_tokens_sampled, usage.visual_tokens_kept)
            assert float(seen_L.float().mean()) == pytest.approx(usage.converted_visual_tokens)
            served_right += text == questions[q].answer
            served_converted += usage.converted_visual_tokens
            served_full += usage.visual_tokens_uncompressed
            kept += usage.visual_tokens_kept
    scores = evaluate(task, setting, "test", IMAGES, timed=False)
    assert scores.exact["all"].right == served_right > 0
    assert scores.converted_percent == pytest.approx(100 * served_converted / served_full, abs=0.01)
    assert scores.kept_percent == pytest.approx(100 * kept / served_full, abs=0.01)
    assert (scores.map_percent == 100) == (name == "off")


def test_branch_shares_by_what_is_in_a_region(tmp_path):
    task = task_of("oracle", tmp_path)
    scores = evaluate(task, SETTINGS["oracle"], "validation", 4, timed=False)
    assert scores.branch_shares["glyph"] == [1, 0, 0]
    assert scores.branch_shares["empty"] == scores.branch_shares["panel"] == [0, 0, 1]
    assert sum(scores.branch_shares["all"]) == pytest.approx(1, abs=1e-3)
    assert scores.exact["fine"].asked + scores.exact["coarse"].asked == scores.exact["all"].asked


def test_permuted_branches_cost_the_same_tokens(tmp_path):
    plain = evaluate(task_of("vision", tmp_path), SETTINGS["vision"], "validation", 4, timed=False)
    dealt = evaluate(task_of("vision", tmp_path), SETTINGS["permuted_branches"], "validation", 4, timed=True)
    assert plain.branch_shares["all"] == dealt.branch_shares["all"] and dealt.question_ms > 0
    assert plain.branch_shares["glyph"] != dealt.branch_shares["glyph"]
