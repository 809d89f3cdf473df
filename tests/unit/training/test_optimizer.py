"""Learning rates of every step and part, and the groups that they are set in."""

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupCosineLR

from services.common.errors import InvalidInput
from services.common.settings import build_settings
from tests.tiny_training import tiny_run
from training.config import OptimizerConfig, RunConfig
from training.optimizer import parameter_groups, part_of, set_rates, share_of_rate, warmup_steps
from training.question_stage import QuestionTask


def run_of(**optimizer) -> RunConfig:
    run = {"name": "n", "steps": 40, "samples_per_worker": 1, "output": "o", "optimizer": optimizer}
    return build_settings(RunConfig, run)


@pytest.mark.parametrize("warmup", [2, 7])
def test_the_logarithmic_schedule_is_deepspeeds(warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    theirs = WarmupCosineLR(optimizer, 40, warmup_num_steps=warmup, warmup_min_ratio=0.01, cos_min_ratio=0.02)
    settings, expected = run_of(warmup_steps=warmup).optimizer, []
    for _ in range(40):
        expected.append(optimizer.param_groups[0]["lr"])
        theirs.step()
    assert [share_of_rate(settings, step, 40) for step in range(40)] == pytest.approx(expected)


def test_the_linear_warmup_is_a_share_of_the_steps_and_the_cosine_ends_at_the_floor():
    settings = OptimizerConfig(warmup="linear", warmup_share=0.03, floor=0.0)
    assert warmup_steps(settings, 1000) == 30
    shares = [share_of_rate(settings, step, 1000) for step in range(1001)]
    assert shares[0] == 0 and shares[15] == pytest.approx(0.5) and shares[30] == 1
    assert shares[515] == pytest.approx(0.5) and shares[1000] == pytest.approx(0)
    assert share_of_rate(OptimizerConfig(floor=0.1), 1000, 1000) == pytest.approx(0.1)


def test_every_trained_parameter_is_in_one_group_of_its_part(tmp_path):
    module = QuestionTask(tiny_run(str(tmp_path))).module.to("meta")
    scales = {"selector_lr_scale": 4, "vision_lr_scale": 0.2, "projector_lr_scale": 100}
    run = run_of(learning_rate=1e-5, **scales)
    groups = parameter_groups(module, run)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trained = {id(parameter): name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert len(grouped) == len(set(grouped)) == len(trained) and set(grouped) == set(trained)
    rates = set_rates(groups, run, step=40)
    assert {part: rate / rates["language_model"] for part, rate in rates.items()} == pytest.approx(
        {"language_model": 1, "projector": 100, "vision_tower": 0.2, "selector": 4}
    )
    for group in groups:
        assert {part_of(trained[id(parameter)]) for parameter in group["params"]} == {group["part"]}
    names = {trained[id(p)] for group in groups if group["part"] == "projector" for p in group["params"]}
    assert {"model.encoder.image_newline", "model.encoder.multi_modal_projector.linear_1.weight"} <= names


def test_nothing_left_to_train_is_refused():
    module = torch.nn.ModuleDict({"vision_tower": torch.nn.Linear(2, 2)})
    with pytest.raises(InvalidInput, match="optimizer.frozen: is .*leaves nothing to train"):
        parameter_groups(module, run_of(frozen=["vision_tower"]))
