"""What the joint model is trained to do is what the two served stages do: same tokens, same choice, same answer."""

import io
import random

import pytest
import torch

from services.common.types import (
    ChatTurn,
    FinishedEvent,
    GenerateRequest,
    ImagePart,
    PruneParams,
    SamplingParams,
    TextPart,
)
from services.encoder.pipeline import EncoderPipeline
from services.llm.engine import Engine
from tests.tiny_training import tiny_run
from training.data.questions import questions
from training.data.rendering import render
from training.data.splits import scene_at
from training.joint_stage import JointTask
from training.layout import pack_text
from training.stochastic_prune import PruneSchedule


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("joint")
    built = JointTask(tiny_run(str(folder / "out")))
    torch.nn.init.normal_(built.module.encoder.vision_guided_sampler.selector.linear.weight, std=1.0)
    built.module.eval()
    built.export(folder / "out")
    built.folder = folder / "out"
    return built


def hidden_of(joint, samples, pruned):
    joint.schedule = PruneSchedule(layers=(2, 2), thresholds=(0.6, 0.6)) if pruned else None
    encoded = joint.encoder([s.image for s in samples], [True] * len(samples))
    with torch.no_grad():
        return joint._run(encoded, pack_text(samples, joint.pad_id), None, random.Random(0))[0]


@pytest.mark.parametrize("pruned", [False, True])
def test_a_branch_in_a_batch_equals_the_branch_alone(task, pruned):
    joint = task.module
    samples = [task.data.sample(i) for i in range(3)]
    together = hidden_of(joint, samples, pruned)
    for b, sample in enumerate(samples):
        for q, branch in enumerate(sample.branches):
            alone = hidden_of(
                joint, [type(sample)(image=sample.image, prefix_ids=sample.prefix_ids, branches=(branch,))], pruned
            )
            size = len(branch.token_ids)
            torch.testing.assert_close(together[b, q, :size], alone[0, 0, :size], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pruned", [False, True])
def test_the_served_first_token_is_the_trained_one(task, pruned):
    joint = task.module
    pipeline = EncoderPipeline.from_checkpoint(task.folder, dtype=torch.float32)
    engine = Engine.from_checkpoint(task.folder, dtype=torch.float32, kv_cache_bytes=1 << 24)
    kept_some = False
    for index in range(4):
        sample = task.data.sample(index)
        rng = random.Random(f"{task.run.seed}/{index}/questions")
        scene = scene_at("train", task.run.seed, index)
        asked = task.data._choose(questions(scene, rng), rng)
        file = io.BytesIO()
        render(scene).save(file, "PNG")
        (tokens,) = pipeline.encode([pipeline.prepare(file.getvalue())], [True])
        hidden = hidden_of(joint, [sample], pruned)
        for q, (branch, question) in enumerate(zip(sample.branches, asked, strict=True)):
            expected = int(joint.language_model.lm_head(hidden[0, q, branch.answer_start - 1]).argmax())
            turn = ChatTurn(role="user", parts=(ImagePart(image=0), TextPart(text=question.question)))
            engine.submit(
                GenerateRequest(
                    request_id="r",
                    turns=(turn,),
                    images=(tokens,),
                    sampling=SamplingParams(max_tokens=1, ignore_eos=True),
                    prune=PruneParams(enabled=pruned, threshold=0.6),
                )
            )
            ids = []
            while engine.has_work():
                for _, event in engine.step():
                    if isinstance(event, FinishedEvent):
                        kept_some |= event.usage.visual_tokens_kept < event.usage.visual_tokens_sampled
                    else:
                        ids += event.token_ids
            assert ids == [expected]
    assert kept_some == pruned


def test_gradients_reach_every_trained_part(task):
    task.module.schedule = PruneSchedule(layers=(2, 2), thresholds=(0.6, 0.6))
    task.module.train()
    loss, metrics = task.module(task.batch(0, 0, 1), 0)
    loss.backward()
    without = [n for n, p in task.module.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    task.module.zero_grad()
    task.module.eval()
    # A bias that softmax cancels (keys) has no gradient by nature.
    assert [n for n in without if not n.endswith("k_proj.bias")] == []
    assert 0 < metrics["kept_share"] < 1 and metrics["sampled_share"] < 1
