"""The vision stage: a gradient for every head whatever a batch shows, and a checkpoint's own tower taught more."""

import torch

from services.checkpoint.store import load_stage
from services.common.settings import build_settings
from services.encoder.pipeline import EncoderPipeline
from tests.tiny_training import MODEL, tiny_run
from training.config import RunConfig
from training.data.tiles import IGNORE, LABEL_CLASSES
from training.dense_labels import TOWER, DenseHeads, DenseTask
from training.question_stage import QuestionTask


def test_a_label_that_no_patch_has_gives_its_head_a_zero_gradient():
    """No gradient at all would put the workers' collectives out of step."""
    torch.manual_seed(0)
    heads = DenseHeads(16)
    labels = {name: torch.zeros(2, 64, dtype=torch.long) for name in LABEL_CLASSES}
    labels["letter"][:] = IGNORE
    loss, metrics = heads(torch.randn(2, 64, 16), labels)
    loss.backward()
    assert torch.isfinite(loss) and "letter" not in metrics and "word" in metrics
    assert (heads.heads["letter"].weight.grad == 0).all()
    assert all(heads.heads[name].weight.grad.any() for name in LABEL_CLASSES if name != "letter")


def test_a_checkpoints_tower_learns_more_and_the_rest_of_it_stays(tmp_path):
    QuestionTask(tiny_run(str(tmp_path / "before"))).export(tmp_path / "before")
    raw = {"name": "v", "steps": 1, "samples_per_worker": 2, "init_from": str(tmp_path / "before")}
    task = DenseTask(build_settings(RunConfig, {**raw, "output": str(tmp_path / "after")}))
    before = load_stage(tmp_path / "before", "encoder")
    for name, tensor in task.module.vision_tower.state_dict().items():
        torch.testing.assert_close(tensor, before[TOWER + name].float())
    with torch.no_grad():
        task.module.vision_tower.embeddings.class_embedding.add_(1)
    task.export(tmp_path / "after")

    after = load_stage(tmp_path / "after", "encoder")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert f"{TOWER}embeddings.class_embedding" in changed and all(name.startswith(TOWER) for name in changed)
    llm = load_stage(tmp_path / "after", "llm")
    assert all(torch.equal(tensor, llm[name]) for name, tensor in load_stage(tmp_path / "before", "llm").items())
    pipeline = EncoderPipeline.from_checkpoint(tmp_path / "after")
    assert pipeline.config.vision["hidden_size"] == MODEL["vision"]["hidden_size"]
