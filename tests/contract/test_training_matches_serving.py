"""What a stage on questions trains is what the two served stages do: same tokens, same choice, same answer."""

import dataclasses
import io
import random

import pytest
import torch

from services.common.types import (
    FinishedEvent,
    GenerateRequest,
    ImagePart,
    PromptTurn,
    SamplerSettings,
    SamplingParams,
    TextPart,
)
from services.encoder.pipeline import EncoderPipeline
from services.llm.engine import Engine
from services.modeling.pruning import PruneSchedule
from services.text.prompt import PromptRenderer
from tests.tiny_training import MODEL, tiny_run
from tests.unit.sampler import oracles as oracle
from training.config import OptimizerConfig
from training.data.branches import BranchBuilder, Exchange
from training.data.questions import questions
from training.data.rendering import render
from training.data.splits import scene_at
from training.question_stage import QuestionTask

FIXED = PruneSchedule(layers=(2, 2), thresholds=(0.6, 0.6))


def question_task(folder, **stage):
    torch.manual_seed(3)
    built = QuestionTask(tiny_run(str(folder / "out"), stage=stage))
    torch.nn.init.normal_(built.module.model.encoder.vision_guided_sampler.selector.linear.weight, std=1.0)
    built.module.eval()
    built.export(folder / "out")
    built.folder = folder / "out"
    return built


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return question_task(tmp_path_factory.mktemp("questions"))


@pytest.fixture(scope="module")
def marker_task(tmp_path_factory):
    """Template markers between question and answer choose too."""
    text_sampler = {**MODEL["text_sampler"], "instruction": "to_answer"}
    return question_task(tmp_path_factory.mktemp("markers"), model={**MODEL, "text_sampler": text_sampler})


@torch.no_grad()
def first_tokens(module, sample, pruned):
    """The likeliest token after each branch's prompt."""
    module.schedule = FIXED if pruned else None
    model = module.model
    done = model.run(module.sequences([sample]), vision_sampler=True, cut=module.draw(random.Random(0), [sample]))
    branch_S, hidden_SD = done.packed.branch_S(), model.language_model.model.norm(done.hidden_SD)
    lengths = [len(branch.token_ids) for branch in sample.branches]
    own = [hidden_SD[branch_S == number][-length:] for number, length in enumerate(lengths)]
    asked = torch.stack([rows[branch.answer_start - 1] for rows, branch in zip(own, sample.branches, strict=True)])
    return model.language_model.lm_head(asked).argmax(1).tolist()


@pytest.mark.parametrize(("kind", "pruned"), [("task", False), ("task", True), ("marker_task", True)])
def test_the_served_first_token_is_the_trained_one(kind, pruned, request):
    task = request.getfixturevalue(kind)
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
        for expected, question in zip(first_tokens(task.module, sample, pruned), asked, strict=True):
            turn = PromptTurn(role="user", parts=(ImagePart(image=0), TextPart(text=question.question)))
            engine.submit(
                GenerateRequest(
                    request_id="r",
                    turns=(turn,),
                    images=(tokens,),
                    sampling=SamplingParams(max_tokens=1, ignore_eos=True),
                    samplers=SamplerSettings(text_sampler=pruned, threshold=0.6),
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
    task.module.schedule = FIXED
    task.module.train()
    loss, metrics = task.module(task.batch(0, 0, 1), 0)
    loss.backward()
    without = [n for n, p in task.module.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    task.module.zero_grad()
    task.module.eval()
    # A bias that softmax cancels (keys) has no gradient by nature.
    assert [n for n in without if not n.endswith("k_proj.bias")] == []
    assert 0 < metrics["kept_share"] < 1 and metrics["sampled_share"] < 1


def test_an_encoder_at_rest_gives_the_same_loss_and_zero_gradients(task, monkeypatch):
    module, batch = task.module, task.batch(0, 0, 1)
    monkeypatch.setattr(module, "schedule", None)
    monkeypatch.setattr(module, "optimizer", OptimizerConfig(encoder_steps=3))
    module.train()
    _, learning = module(batch, 2)
    loss, resting = module(batch, 3)
    loss.backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    module.zero_grad()
    module.eval()
    assert resting["language"] == pytest.approx(learning["language"], rel=1e-5)
    assert resting["sampled_share"] == learning["sampled_share"] < 1
    # ZeRO waits for every one of them.
    assert all(gradient is not None for gradient in gradients.values())
    moved = {name.split(".")[1] for name, gradient in gradients.items() if gradient.any()}
    assert moved == {"language_model"}


def test_what_a_step_draws_depends_on_seed_step_and_place_alone(task):
    module, samples = task.module, [task.data.sample(index) for index in range(2)]
    samples[0] = dataclasses.replace(samples[0], branches=samples[0].branches[:2])
    module.schedule = PruneSchedule(layers=(1, 3), thresholds=(0.3, 0.9))

    def drawn(step, place, of=samples):
        return module.draw(random.Random(f"{module.seed}/{step}/0"), of, place)

    assert drawn(3, 1) == drawn(3, 1) and len(set(drawn(3, 1).thresholds)) == 5
    assert (
        len({(draw.layer, draw.thresholds) for draw in (drawn(step, place) for step in (0, 3) for place in (0, 1))})
        == 4
    )
    # Micro-batches draw what one of all their images would, though an image has fewer questions than others.
    halves = drawn(3, 0, samples[:1]), drawn(3, 1, samples[1:])
    assert drawn(3, 0).thresholds == halves[0].thresholds + halves[1].thresholds
    assert {half.layer for half in halves} == {drawn(3, 0).layer}
    module.schedule = FIXED


@pytest.mark.parametrize("coefficients", [(1.0, 1.0, 1.0), (7.1, 5.0, 1.5)])
def test_the_balance_loss_is_over_all_regions_of_the_batch(tmp_path, coefficients):
    model = {**MODEL, "vision_sampler": {**MODEL["vision_sampler"], "balance_coefficients": coefficients}}
    task = question_task(tmp_path, model=model, prune=None)
    module, samples = task.module, [task.data.sample(i) for i in range(3)]
    with torch.no_grad():
        loss, metrics = module((0, samples), 0)
        encoded = module.model.encode([s.image for s in samples], True)
    probs = [p for e in encoded for p in e.sampled.probs_MK.tolist()]
    expected = oracle.balance(probs, coefficients)
    assert metrics["balance"] == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(metrics["language"] + 0.1 * expected, rel=1e-4)
    # A selector that rests from step 1 on has none of it.
    for rests in ("selector_steps", "encoder_steps"):
        module.optimizer = OptimizerConfig(**{rests: 1})
        with torch.no_grad():
            (learning, _), (resting, rested) = module((0, samples), 0), module((0, samples), 1)
        assert learning.item() == pytest.approx(loss.item()) and resting.item() == pytest.approx(rested["language"])
    chosen = oracle.likeliest(probs)
    assert [metrics[f"branch_{k}"] for k in range(3)] == pytest.approx(
        [chosen.count(k) / len(chosen) for k in range(3)]
    )


@pytest.mark.parametrize("instruction", ["last_turn", "all_turns", "to_answer"])
def test_users_words_choose_and_an_answer_never_does(task, instruction):
    config = task.config
    renderer = PromptRenderer(task.tokenizer, image_token_id=config.image_token_id, context=2048,
                              instruction=instruction)  # fmt: skip
    _, branch = BranchBuilder(renderer).build(Exchange(question="how many cards ?", answer="green"))
    asked = [token for token, theirs in zip(branch.token_ids, branch.instruction, strict=True) if theirs]
    words = task.tokenizer.decode(asked).split()
    if instruction == "to_answer":
        first = branch.instruction.index(True)
        assert branch.instruction[first : branch.answer_start] == (True,) * (branch.answer_start - first)
        words = words[:4]
    assert "".join(words) == "howmanycards?"
    assert not any(branch.instruction[branch.answer_start :])
