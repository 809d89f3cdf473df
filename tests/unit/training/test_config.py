"""Run configurations say what is wrong with them; the vision stage's rescaling changes a factor and nothing else."""

import pathlib

import pytest
import torch

from services.common.errors import InvalidInput
from services.common.settings import build_settings
from services.compute.dtypes import dtype_name
from tests.tiny_training import tiny_run
from training import checkpoints, launch, trainer
from training.config import ClusterConfig, RunConfig, load
from training.conversation_settings import ConversationStage
from training.dense_labels import DenseModel, DenseStage, labelled_batch, scale_features
from training.experiments.task import ExperimentStage
from training.optimizer import parameter_groups, rate_before_rest
from training.question_settings import QuestionStage
from training.question_stage import QuestionTask

CONFIGS = sorted((pathlib.Path(__file__).parents[3] / "training/configs").glob("*.yaml"))
TINY = next(path for path in CONFIGS if path.stem == "tiny")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configurations_load(path):
    run = load(path, ["steps=7", "epochs=0", "cluster.workers=1", "optimizer.learning_rate=1e-4"])
    assert (run.steps, run.cluster.workers, run.optimizer.learning_rate) == (7, 1, 1e-4)
    on_conversations = ConversationStage if launch.is_path(run.stage.get("data")) else ExperimentStage
    assert run.output and build_settings(DenseStage if path.stem == "tiny-vision" else on_conversations, run.stage)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 1}, "stepz: unknown setting"),
        ({"steps": "many"}, "steps: is 'many', expected int"),
        ({"optimizer": {"learning_rate": "fast"}}, "optimizer.learning_rate: is 'fast', expected float"),
        ({"cluster": {"gpus": 8}}, "cluster.gpus: unknown setting"),
        ({"steps": 0}, "steps: is 0, expected 1 or more"),
        ({"steps": True}, "steps: is True, expected int"),
        ({"log_every": 0}, "log_every: is 0, expected 1 or more"),
        ({"optimizer": 5}, "optimizer: is 5, expected a mapping"),
        ({"optimizer": None}, "optimizer: is None, expected a mapping"),
        ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate: is nan, expected 0 or more"),
        ({"optimizer": {"learning_rate": True}}, "optimizer.learning_rate: is True, expected float"),
        ({"optimizer": {"learning_rate": -1}}, "optimizer.learning_rate: is -1, expected 0 or more"),
        ({"optimizer": {"betas": 0.9}}, "optimizer.betas: is 0.9, expected a list"),
        ({"optimizer": {"betas": [0.9]}}, r"optimizer.betas: is \[0.9\], expected a list of 2"),
        ({"optimizer": {"frozen": "encoder"}}, "optimizer.frozen: is 'encoder', expected a list"),
        ({"optimizer": {"frozen": [1]}}, r"optimizer.frozen\[0\]: is 1, expected str"),
        ({"stage": ["a"]}, r"stage: is \['a'\], expected a mapping"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(InvalidInput, match=f"^{message}"):
        build_settings(RunConfig, {"name": "n", "steps": 1, "samples_per_worker": 1, "output": "o", **change})


@pytest.mark.parametrize(
    "prune",
    [
        {"layers": [8, 24]},
        {"layers": [0, 2]},
        {"layers": [3, 1]},
        {"layers": [1, 2], "thresholds": [0.0, 1.0]},
        {"layers": [1, 2], "thresholds": [0.7, 1.5]},
    ],
)
def test_a_prune_schedule_that_the_decoder_cannot_follow_is_refused(prune):
    """A layer beyond the last would prune nothing, without a word."""
    with pytest.raises(InvalidInput, match=r"stage\.prune\.\w+: is .*expected an ascending pair"):
        QuestionTask(tiny_run("unused", stage={"prune": prune}))


def test_missing_field_and_bad_override_are_named():
    with pytest.raises(InvalidInput, match="output: is missing"):
        build_settings(RunConfig, {"name": "n", "steps": 1, "samples_per_worker": 1})
    with pytest.raises(InvalidInput, match="expected name=value"):
        load(TINY, ["steps"])
    with pytest.raises(InvalidInput, match="--set steps.x=5: steps is not a mapping"):
        load(TINY, ["steps.x=5"])


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("")
    with pytest.raises(InvalidInput, match="name: is missing"):
        load(tmp_path / "run.yaml")


def test_what_is_frozen_must_be_there():
    run = {"name": "n", "steps": 1, "samples_per_worker": 1, "output": "o", "optimizer": {"frozen": ["visoin_tower"]}}
    with pytest.raises(InvalidInput, match="optimizer.frozen: no parameter's name starts with 'visoin_tower'"):
        parameter_groups(torch.nn.ModuleDict({"vision_tower": torch.nn.Linear(2, 2)}), build_settings(RunConfig, run))


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"colur": 9}, "stage.kind_weights.colur: posters asks number"), ({"count": 0}, "count: is 0, expected above 0")],
)
def test_a_weight_of_a_kind_that_nobody_asks_is_refused(weights, message):
    with pytest.raises(InvalidInput, match=message):
        build_settings(QuestionStage, {"data": "posters", "kind_weights": weights}, "stage.")


def test_a_generator_that_there_is_not_is_refused():
    with pytest.raises(
        InvalidInput, match=r"stage\.data: is 'postrs', expected one of scenes, posters, textured_posters, easy_vqa"
    ):
        build_settings(QuestionStage, {"data": "postrs"}, "stage.")


def test_own_data_is_found_from_any_folder():
    run = {"name": "n", "steps": 1, "samples_per_worker": 1, "output": "o"}
    found = {
        data: launch.absolute(build_settings(RunConfig, {**run, "stage": {"data": data}})).stage["data"]
        for data in ("posters", "d.json", "~/d.json", "/data/d")
    }
    here, home = pathlib.Path.cwd(), pathlib.Path.home()
    assert list(found.values()) == ["posters", f"{here}/d.json", f"{home}/d.json", "/data/d"]


def test_a_run_of_other_settings_is_not_gone_on_with():
    def made_of(**changes):
        run = {"name": "n", "steps": 1, "samples_per_worker": 1, "output": "o", **changes}
        return checkpoints.what_it_is_made_of(build_settings(RunConfig, run))

    checkpoints.check_resumed("n", made_of(), made_of(steps=9, output="elsewhere"))
    with pytest.raises(
        InvalidInput, match="has the name 'n': seed was 0, is 1; stage was {}, is {'data': 'mine.json'}"
    ):
        checkpoints.check_resumed("n", made_of(), made_of(seed=1, stage={"data": "mine.json"}))


def test_scaling_features_scales_them_exactly():
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = DenseModel({**vision, "image_size": 96, "patch_size": 12}, "conv")
    batch = labelled_batch(0, 0, 4)
    before = model(batch, 0)[0]
    scale_features(model.vision_tower, 0.125)
    torch.testing.assert_close(model(batch, 0)[0], before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("selector_steps", "encoder_steps", "expected"),
    [(0, 0, (0, 0, 0)), (5, 0, (0, 5, 0)), (0, 7, (7, 7, 0)), (5, 7, (7, 5, 0)), (9, 7, (7, 7, 0))],
)
def test_selector_and_encoder_rest_after_steps_of_their_own(selector_steps, encoder_steps, expected):
    encoder = {name: torch.nn.Linear(2, 2, bias=False) for name in ("vision_tower", "selector")}
    module = torch.nn.ModuleDict(
        {"encoder": torch.nn.ModuleDict(encoder), "language_model": torch.nn.Linear(2, 2, bias=False)}
    )
    optimizer = {"selector_steps": selector_steps, "encoder_steps": encoder_steps}
    run = {"name": "n", "steps": 1, "samples_per_worker": 1, "output": "o", "optimizer": optimizer}
    groups = parameter_groups(module, build_settings(RunConfig, run))
    learns_for = {id(parameter): group["learns_for"] for group in groups for parameter in group["params"]}
    assert tuple(learns_for[id(parameter)] for parameter in module.parameters()) == expected


def test_selector_and_vision_tower_have_learning_rates_of_their_own():
    module = torch.nn.ModuleDict(
        {name: torch.nn.Linear(2, 2) for name in ("vision_tower", "selector", "language_model", "projector")}
    )
    optimizer = {"learning_rate": 1.0, "weight_decay": 0.5, "selector_lr_scale": 4, "vision_lr_scale": 0.2}
    run = {"name": "n", "steps": 1, "samples_per_worker": 1, "output": "o"}
    run["optimizer"] = {**optimizer, "frozen": ["projector"]}
    groups = parameter_groups(module, build_settings(RunConfig, run))
    rate = {id(parameter): (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]}
    named = {name: rate.get(id(parameter)) for name, parameter in module.named_parameters()}
    assert named == {
        "vision_tower.weight": (0.2, 0.5),
        "vision_tower.bias": (0.2, 0.0),
        "selector.weight": (4.0, 0.5),
        "selector.bias": (4.0, 0.0),
        "language_model.weight": (1.0, 0.5),
        "language_model.bias": (1.0, 0.0),
        "projector.weight": None,
        "projector.bias": None,
    }


def test_a_dtype_that_training_has_not_is_refused_by_name():
    run = {"name": "n", "steps": 1, "samples_per_worker": 1, "output": "o"}
    with pytest.raises(InvalidInput, match="cluster.dtype: is 'float16', expected one of auto, bfloat16, float32"):
        build_settings(RunConfig, {**run, "cluster": {"dtype": "float16"}})
    assert build_settings(RunConfig, {**run, "cluster": {"dtype": "float32"}}).cluster.dtype == "float32"


PROCESSORS = {(True, True): "bfloat16", (True, False): "float32", (False, True): "float32"}
"""Whether each of two workers' processors multiplies in bf16, and what both then train in."""


def _agree(_: int, rank: int, store: str, found: str) -> None:
    """Runs as one worker."""
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    names = []
    for processors in PROCESSORS:
        trainer.cpu_has_bfloat16 = lambda has=processors[rank]: has
        names.append(dtype_name(trainer.agreed_dtype(ClusterConfig())))
    pathlib.Path(f"{found}{rank}").write_text(" ".join(names), encoding="utf8")
    torch.distributed.destroy_process_group()


def test_all_workers_train_in_one_dtype(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "cpu_has_bfloat16", trainer.cpu_has_bfloat16)  # `_agree` sets it
    files = str(tmp_path / "store"), str(tmp_path / "rank")
    other = torch.multiprocessing.start_processes(_agree, (1, *files), 1, join=False, start_method="fork")
    _agree(0, 0, *files)
    other.join()
    assert [(tmp_path / f"rank{rank}").read_text().split() for rank in (0, 1)] == [list(PROCESSORS.values())] * 2


def test_a_dtype_that_is_named_is_trained_in():
    assert trainer.agreed_dtype(ClusterConfig(dtype="bfloat16")) == torch.bfloat16
    assert trainer.agreed_dtype(ClusterConfig(dtype="float32", use_gpu=True)) == torch.float32
    assert trainer.agreed_dtype(ClusterConfig(use_gpu=True)) == torch.bfloat16


@pytest.mark.parametrize(
    ("learns_for", "cooldown", "rates"),
    [(0, 4, [1, 1, 1, 1, 1, 1, 1]), (4, 0, [1, 1, 1, 1, 0, 0, 0]), (5, 4, [1, 1, 0.75, 0.5, 0.25, 0, 0])],
)
def test_what_comes_to_rest_slows_down_before(learns_for, cooldown, rates):
    assert [rate_before_rest(step, learns_for, cooldown) for step in range(7)] == rates
