"""A stage on conversations of a file: losses of a global batch, what learns, held-out answers, and its export."""

import json
import shutil
import sys

import pytest
import torch

from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.store import load_stage
from services.common.errors import InvalidInput
from services.common.settings import build_settings
from tests.conversation_data import make_conversations
from training.config import RunConfig
from training.conversation_settings import LONGEST
from training.conversation_stage import AlignmentTask, ConversationTask
from training.global_batch import Totals
from training.optimizer import parameter_groups, part_of

STEP = 1


pytestmark = pytest.mark.usefixtures("one_worker")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_conversations(tmp_path_factory.mktemp("conversations"))


def run_of(folder, **changes) -> RunConfig:
    stage = {
        "data": str(folder / "data.json"),
        "processes": 0,
        "max_length": 512,
        "balance": 2.0,
        "prune": {"layers": [1, 2], "thresholds": [0.3, 0.9]},
        "model": {"vision_sampler": {"branches": [[2, 2], [4, 4]], "balance_coefficients": [1.0, 1.0]}},
        **changes.pop("stage", {}),
    }
    raw = {"name": "n", "epochs": 1, "samples_per_worker": 8, "global_batch": 8, "output": str(folder / "out")}
    cluster = {"dtype": "float32", "storage_path": str(folder / "runs")}
    return build_settings(
        RunConfig, {**raw, "init_from": str(folder / "imported"), "cluster": cluster, "stage": stage, **changes}
    )


def one_step(folder, samples: int):
    """Loss and gradients of a step's global batch of 8, cut into micro-batches."""
    torch.manual_seed(0)
    task = ConversationTask(run_of(folder, samples_per_worker=samples))
    torch.nn.init.normal_(task.module.model.encoder.vision_guided_sampler.selector.linear.weight)
    batches = [task.batch(STEP, place, places := 8 // samples) for place in range(8 // samples)]
    counts = torch.stack([task.count(batch, STEP) for batch in batches]).sum(0)
    losses = []
    for batch in batches:
        totals = Totals(micro_batches=places, counts=counts) if places > 1 else None
        loss, metrics = task.module(batch, STEP, totals)
        (loss / places).backward()
        losses.append(loss.item() / places)
    gradients = torch.cat([p.grad.flatten() for p in task.module.parameters() if p.grad is not None])
    return sum(losses), gradients, metrics, task.module.model


def test_accumulating_is_one_large_batch(folder):
    """Text alone and short answers are among them; one layer is drawn a step, one threshold a conversation."""
    whole, gradients, metrics, model = one_step(folder, 8)
    parts, summed, *_ = one_step(folder, 2)
    assert parts == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(summed, gradients, rtol=2e-3, atol=2e-5)
    assert {"language", "balance", "branch_0", "sampled_share", "kept_share", "kept_layer_0"} <= metrics.keys()
    linear = [p.numel() for name, p in model.language_model.named_parameters() if name.endswith("_proj.weight")]
    assert metrics["flops"] > 6 * metrics["text_tokens"] * sum(linear)
    assert 0 < metrics["kept_share"] < 1 and metrics["branch_0"] + metrics["branch_1"] == pytest.approx(1)


def test_what_is_drawn_does_not_depend_on_where_the_data_lies(folder, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    here, there = (ConversationTask(run_of(place)) for place in (folder, moved))
    draws = [task.module.draw(task.batch(STEP, 0, 1)[1], STEP) for task in (here, there)]
    assert draws[0] == draws[1] and len(set(draws[0].thresholds)) == 8
    assert here.batch(STEP, 0, 1)[1][0].name != there.batch(STEP, 0, 1)[1][0].name


def test_a_resumed_run_counts_on(folder, capsys):
    task, resumed = (ConversationTask(run_of(folder)) for _ in range(2))
    task.batch(0, 0, 1)
    resumed.load(task.state())
    resumed.batch(1, 0, 1)
    assert resumed.state()["entries"] == 2 * task.state()["entries"] == 16
    resumed.close()
    assert "data: 16 entries, " in capsys.readouterr().out


def test_alignment_trains_the_projector_alone_with_all_visual_tokens(folder):
    task = AlignmentTask(run_of(folder, stage={"prune": None, "template": "plain"}))
    groups = parameter_groups(task.module, task.run)
    assert {group["part"] for group in groups} == {"projector"}
    trained = {name for name, parameter in task.module.model.named_parameters() if parameter.requires_grad}
    assert "encoder.image_newline" in trained and all("newline" in n or "projector" in n for n in trained)
    loss, metrics = task.module(task.batch(0, 0, 1), 0)
    loss.backward()
    assert metrics["sampled_share"] == 1 and task.module.model.encoder.image_newline.grad.any()


def test_what_was_trained_is_on_in_the_export_and_held_out_answers_are_kept(folder, tmp_path):
    held_out = {"data": str(folder / "data.json"), "entries": 3, "answers": 2, "answer_tokens": 3}
    run = run_of(folder, stage={"validation": held_out})
    task = ConversationTask(run)
    assert task.epoch() == 1 and task.identity() == ConversationTask(run).identity()
    (folder / "runs" / "n").mkdir(parents=True)
    task.module.eval()
    found = task.validate(7)
    assert found == {"validation_loss": pytest.approx(task.validate(8)["validation_loss"])}
    rows = [json.loads(line) for line in (folder / "runs/n/answers.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [7, 7, 8, 8] and rows[:2] == [{**row, "step": 7} for row in rows[2:]]
    assert {"entry", "asked", "right", "said"} < rows[0].keys() and rows[0]["right"]
    task.export(tmp_path / "made")
    config = FocusLlavaConfig.load(tmp_path / "made")
    assert config.vision_sampler.enabled and config.text_sampler.enabled
    before, after = (load_stage(made, "llm") for made in (folder / "imported", tmp_path / "made"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].float(), after[name].float()) for name in after)


def test_adapters_learn_in_place_of_the_language_model_and_are_merged_into_the_export(folder, tmp_path):
    task = ConversationTask(run_of(folder, stage={"lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "up_proj"]}}))
    trained = {name for name, parameter in task.module.model.named_parameters() if parameter.requires_grad}
    assert {part_of(name) for name in trained} == {"language_model", "projector", "vision_tower", "selector"}
    assert all(".lora_" in name for name in trained if part_of(name) == "language_model")
    for _ in range(2):  # the first step moves lora_B alone, which starts at zero
        optimizer = torch.optim.SGD([p for p in task.module.parameters() if p.requires_grad], lr=0.1)
        optimizer.zero_grad()
        task.module(task.batch(STEP, 0, 1), STEP)[0].backward()
        optimizer.step()
    task.export(tmp_path / "made")
    before, after = (load_stage(made, "llm") for made in (folder / "imported", tmp_path / "made"))
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(before[name].float(), after[name].float())}
    assert changed == {name for name in after if name.endswith(("q_proj.weight", "up_proj.weight"))}


def test_sequences_are_as_long_as_the_context_where_nothing_else_is_said(folder):
    task = ConversationTask(run_of(folder, stage={"max_length": None}))
    assert task.loader.encoder.max_length == task.module.model.config.text_config.max_position_embeddings < LONGEST


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": ""}, "init_from: is empty, expected the folder of a checkpoint"),
        ({"stage": {"max_length": 9000}}, "stage.max_length: is 9000, expected the model's context 2048 or less"),
        ({"stage": {"prune": {"layers": [8, 24]}}}, "stage.prune.layers"),
        ({"stage": {"lora": {"rank": 4}}}, "stage.lora: needs PEFT, .*: pip install peft"),
    ],
)
def test_mistakes_are_named(folder, changes, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InvalidInput, match=message):
        ConversationTask(run_of(folder, **changes))
