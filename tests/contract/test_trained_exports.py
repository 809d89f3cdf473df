"""What a run trained is on in its export and served so; what it left alone stays as it was."""

import pytest
import torch

from services.checkpoint.config import FocusLlavaConfig
from services.common.errors import InvalidInput
from services.common.types import GenerateRequest, ImagePart, PromptTurn, SamplingParams, TextPart
from services.encoder.pipeline import EncoderPipeline
from services.llm.engine import Engine
from tests.serving_client import picture
from tests.tiny_training import MODEL, tiny_run, train_imported
from training.experiments.task import ExperimentTask
from training.question_stage import QuestionTask


@pytest.mark.parametrize("vision", [True, False])
@pytest.mark.parametrize("text", [True, False])
def test_what_was_trained_on_an_imported_checkpoint_is_on_in_its_export_and_served(tmp_path, vision, text):
    """An import has the vision-guided sampler off, for its selector is new."""
    train_imported(tmp_path, vision=vision, text=text)
    exported = FocusLlavaConfig.load(tmp_path / "out")
    assert (exported.vision_sampler.enabled, exported.text_sampler.enabled) == (vision, text)

    # What the command line asks for by default: both samplers on, the checkpoint's own threshold.
    pipeline = EncoderPipeline.from_checkpoint(tmp_path / "out", dtype=torch.float32)
    engine = Engine.from_checkpoint(tmp_path / "out", dtype=torch.float32, kv_cache_bytes=1 << 23)
    (tokens,) = pipeline.encode([pipeline.prepare(picture(5, (56, 56)))], [True])
    assert (len(tokens.tokens_ND) < tokens.uncompressed_tokens == 88) == vision
    turn = PromptTurn(role="user", parts=(ImagePart(image=0), TextPart(text="What number is on the red card?")))
    engine.submit(
        GenerateRequest(request_id="r", turns=(turn,), images=(tokens,), sampling=SamplingParams(max_tokens=2))
    )
    events = []
    while engine.has_work():
        events += engine.step()
    usage = events[-1][1].usage
    assert usage.visual_tokens_uncompressed == 88 and (usage.visual_tokens_sampled < 88) == vision
    assert (usage.visual_tokens_kept < usage.visual_tokens_sampled) == text


@pytest.mark.parametrize(
    ("init", "stage", "enabled"),
    [
        (False, {"vision_sampler": False, "prune": None}, False),
        (False, {"vision_sampler": True, "branch_control": {"name": "random", "shares": [0.5, 0.3, 0.2]}}, False),
        (False, {"vision_sampler": True}, True),
        (True, {"vision_sampler": False, "prune": None}, True),
        (True, {"vision_sampler": False, "prune": None, "fresh_selector": True}, False),
        (True, {"vision_sampler": True, "fresh_selector": True}, True),
    ],
)
def test_a_selector_that_nobody_trained_is_off_and_what_a_run_leaves_alone_stays(tmp_path, init, stage, enabled):
    first = QuestionTask(tiny_run(str(tmp_path / "first")))
    first.export(tmp_path / "first")
    run = tiny_run(str(tmp_path / "out"), stage=stage, **({"init_from": str(tmp_path / "first")} if init else {}))
    ExperimentTask(run).export(tmp_path / "out")
    assert FocusLlavaConfig.load(tmp_path / "first").vision_sampler.enabled
    assert FocusLlavaConfig.load(tmp_path / "out").vision_sampler.enabled == enabled


@pytest.mark.parametrize("sampler", ["vision_sampler", "text_sampler"])
def test_a_sampler_is_not_trained_and_switched_off_at_once(tmp_path, sampler):
    model = {**MODEL, sampler: {**MODEL[sampler], "enabled": False}}
    with pytest.raises(InvalidInput, match=rf"stage.model.{sampler}.enabled: is false, and stage\.\w+.* trains it"):
        QuestionTask(tiny_run(str(tmp_path / "out"), stage={"model": model}))
