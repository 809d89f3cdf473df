"""What the joint model is trained to do is what the two served stages do: same tokens, same choice, same answer."""

import dataclasses
import io
import json
import random
from dataclasses import dataclass, field

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

from services.checkpoint.config import FocusLlavaConfig, TextSamplerConfig, VisionSamplerConfig
from services.checkpoint.import_llava_next import import_llava_next
from services.common.errors import InvalidInput
from services.common.types import (
    ChatTurn,
    CompressedVisualTokens,
    FinishedEvent,
    GenerateRequest,
    ImagePart,
    SamplerSettings,
    SamplingParams,
    TextPart,
)
from services.encoder.pipeline import EncoderPipeline
from services.llm.engine import Engine
from services.llm.prompt import PromptRenderer
from tests.llm_reference import causal_mask, naive_kept
from tests.tiny_checkpoints import make_hub_checkpoint, make_random_checkpoint
from tests.tiny_training import MODEL, tiny_run
from tests.unit.sampler import oracles as oracle
from training.data.branches import BranchBuilder, Exchange
from training.data.questions import questions
from training.data.rendering import render
from training.data.splits import scene_at
from training.joint_stage import JointTask
from training.layout import pack_text
from training.stochastic_prune import PruneSchedule


def joint_task(folder, **stage):
    torch.manual_seed(3)
    built = JointTask(tiny_run(str(folder / "out"), stage=stage))
    torch.nn.init.normal_(built.module.encoder.vision_guided_sampler.selector.linear.weight, std=1.0)
    built.module.eval()
    built.export(folder / "out")
    built.folder = folder / "out"
    return built


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return joint_task(tmp_path_factory.mktemp("joint"))


@pytest.fixture(scope="module")
def marker_task(tmp_path_factory):
    """Template markers between question and answer choose too."""
    text_sampler = {**MODEL["text_sampler"], "instruction": "to_answer"}
    return joint_task(tmp_path_factory.mktemp("markers"), model={**MODEL, "text_sampler": text_sampler})


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


@pytest.mark.parametrize(("kind", "pruned"), [("task", False), ("task", True), ("marker_task", True)])
def test_the_served_first_token_is_the_trained_one(kind, pruned, request):
    task = request.getfixturevalue(kind)
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


def test_an_encoder_at_rest_gives_the_same_loss_and_zero_gradients(task, monkeypatch):
    joint, batch = task.module, task.batch(0, 0, 1)
    monkeypatch.setattr(joint, "schedule", None)
    monkeypatch.setattr(joint, "encoder_steps", 3)
    joint.train()
    _, learning = joint(batch, 2)
    loss, resting = joint(batch, 3)
    loss.backward()
    gradients = {name: p.grad for name, p in joint.named_parameters() if p.requires_grad}
    joint.zero_grad()
    joint.eval()
    assert resting["language"] == pytest.approx(learning["language"], rel=1e-5)
    assert resting["sampled_share"] == learning["sampled_share"] < 1
    # ZeRO waits for every one of them.
    assert all(gradient is not None for gradient in gradients.values())
    moved = {name.split(".")[0] for name, gradient in gradients.items() if gradient.any()}
    assert moved == {"language_model"}


@dataclass(frozen=True, kw_only=True)
class NotedSchedule(PruneSchedule):
    """Draws as its parent does, and notes what."""

    drawn: list[float] = field(default_factory=list)

    def draw_layer(self, rng):
        self.drawn.append(super().draw_layer(rng))
        return self.drawn[-1]

    def draw_threshold(self, rng):
        self.drawn.append(super().draw_threshold(rng))
        return self.drawn[-1]


def one_question(lm, tokens_ND, sample, branch, prune_layer, threshold):
    """transformers' own decoder on one question, tokens taken out before a layer; hidden states, and who was kept."""
    before, count, length = len(sample.prefix_ids), len(tokens_ND), len(branch.token_ids)
    words = lm.model.embed_tokens(torch.tensor([*sample.prefix_ids, *branch.token_ids]))
    hidden_1SD = torch.cat((words[:before], tokens_ND, words[before:]))[None]
    position_S, kept = torch.arange(before + count + length), list(range(count))
    for index, layer in enumerate(lm.model.layers):
        if index == prune_layer:
            asked = [before + count + t for t, theirs in enumerate(branch.instruction) if theirs]
            visual = list(range(before, before + count))
            kept = naive_kept(layer, hidden_1SD[0], lm.model.rotary_emb(hidden_1SD, position_S[None]), asked, visual,
                              threshold)  # fmt: skip
            stay = [p for p in range(len(position_S)) if not before <= p < before + count or p - before in kept]
            hidden_1SD, position_S = hidden_1SD[:, stay], position_S[stay]
        hidden_1SD = layer(
            hidden_1SD,
            attention_mask=causal_mask(len(position_S)),
            position_embeddings=lm.model.rotary_emb(hidden_1SD, position_S[None]),
        )
    return lm.model.norm(hidden_1SD)[0, -length:], kept


@pytest.mark.parametrize(
    ("layers", "thresholds"), [((2, 2), (0.6, 0.6)), ((1, 3), (0.85, 0.85)), ((1, 3), (0.3, 0.95))]
)
def test_layer_and_threshold_fixed_or_drawn_prune_as_plain_loops_do(task, layers, thresholds):
    joint = task.module
    lm = AutoModelForCausalLM.from_config(joint.config.text_config, attn_implementation="eager").eval()
    lm.load_state_dict(joint.language_model.state_dict())
    samples = [task.data.sample(i) for i in range(2)]
    seen = set()
    for seed in (0, 1, 5):
        joint.schedule = schedule = NotedSchedule(layers=layers, thresholds=thresholds)
        with torch.no_grad():
            encoded = joint.encoder([s.image for s in samples], [True, True])
            text = pack_text(samples, joint.pad_id)
            together = joint._run(encoded, text, None, random.Random(seed))[0]
            layer, *gammas = schedule.drawn
            seen.add(layer)
            branches = text.token_ids_BQT.shape[1]
            assert len(gammas) == 2 * branches and len(set(gammas)) == (1 if thresholds[0] == thresholds[1] else 6)
            for b, sample in enumerate(samples):
                for q, branch in enumerate(sample.branches):
                    gamma = gammas[b * branches + q]
                    expected, kept = one_question(lm, encoded[b].tokens_ND, sample, branch, layer, gamma)
                    assert 0 < len(kept) < len(encoded[b].tokens_ND)
                    torch.testing.assert_close(together[b, q, : len(branch.token_ids)], expected, rtol=1e-3, atol=1e-3)
    assert all(layers[0] <= layer <= layers[1] for layer in seen) and (len(seen) > 1) == (layers[0] < layers[1])


def test_what_a_step_draws_depends_on_seed_step_and_rank_alone(task):
    joint, samples = task.module, [task.data.sample(0)]

    def drawn(step, rank):
        joint.schedule = NotedSchedule(layers=(1, 3), thresholds=(0.3, 0.9))
        with torch.no_grad():
            joint((rank, samples), step)
        return joint.schedule.drawn

    assert drawn(3, 1) == drawn(3, 1)
    assert len({tuple(drawn(step, rank)) for step in (0, 3) for rank in (0, 1)}) == 4


@pytest.mark.parametrize("coefficients", [(1.0, 1.0, 1.0), (7.1, 5.0, 1.5)])
def test_the_balance_loss_is_over_all_regions_of_the_batch(task, monkeypatch, coefficients):
    joint, samples = task.module, [task.data.sample(i) for i in range(3)]
    joint.schedule = None
    sampler = joint.config.vision_sampler
    monkeypatch.setattr(joint, "config", dataclasses.replace(
        joint.config, vision_sampler=dataclasses.replace(sampler, balance_coefficients=coefficients)))  # fmt: skip
    with torch.no_grad():
        loss, metrics = joint((0, samples), 0)
        encoded = joint.encoder([s.image for s in samples], [True] * 3)
    probs = [p for e in encoded for p in e.sampled.probs_MK.tolist()]
    expected = oracle.balance(probs, coefficients)
    assert metrics["balance"] == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(metrics["language"] + 0.1 * expected, rel=1e-4)
    # A selector that rests from step 1 on has none of it.
    for rests in ("selector_steps", "encoder_steps"):
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(joint, rests, 1)
            (learning, _), (resting, rested) = joint((0, samples), 0), joint((0, samples), 1)
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
    history = [Exchange(question="what colour is the card ?", answer="green")]
    _, branch = BranchBuilder(renderer).build(Exchange(question="how many cards ?", answer="green"), history)
    asked = [token for token, theirs in zip(branch.token_ids, branch.instruction, strict=True) if theirs]
    words = task.tokenizer.decode(asked).split()
    both = "what colour is the card ? how many cards ?".split()
    if instruction == "to_answer":
        first = branch.instruction.index(True)
        assert branch.instruction[first : branch.answer_start] == (True,) * (branch.answer_start - first)
        words = words[:4]
    assert "".join(words) == "".join(both if instruction == "all_turns" else both[-4:])
    assert not any(branch.instruction[branch.answer_start :])


@pytest.mark.parametrize("vision", [True, False])
@pytest.mark.parametrize("text", [True, False])
def test_what_was_trained_on_an_imported_checkpoint_is_on_in_its_export_and_served(tmp_path, vision, text):
    """An import has the vision-guided sampler off, for its selector is new."""
    import_llava_next(make_hub_checkpoint(tmp_path / "hub"), tmp_path / "imported")
    config = FocusLlavaConfig.load(tmp_path / "imported")
    switched = dataclasses.replace(config, text_sampler=dataclasses.replace(config.text_sampler, enabled=False))
    switched.save(tmp_path / "imported")
    entries = []
    for index, size_wh in enumerate(((56, 40), (80, 30), (90, 90))):
        (tmp_path / f"{index}.png").write_bytes(picture(index, size_wh))
        turns = [
            {"from": "human", "value": "<image>\nWhat number is on the red card?"},
            {"from": "gpt", "value": "Six"},
        ]
        entries.append({"image": f"{index}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(entries))
    stage = {
        "vision_sampler": vision,
        "prune": {"layers": [2, 2], "thresholds": [0.6, 0.6]} if text else None,
        "data": str(tmp_path / "data.json"),
        # Coarse branches are to be chosen, which a selector of two steps would not.
        "model": {"vision_sampler": {"branches": [[2, 2], [4, 4]], "balance_coefficients": [1.0, 1.0]}},
    }
    joint_run = JointTask(tiny_run(str(tmp_path / "out"), stage=stage, init_from=str(tmp_path / "imported")))
    optimizer = torch.optim.SGD([p for p in joint_run.module.parameters() if p.requires_grad], lr=1e-3)
    for step in range(2):
        optimizer.zero_grad()
        loss, _ = joint_run.module(joint_run.batch(step, 0, 1), step)
        loss.backward()
        optimizer.step()
    joint_run.export(tmp_path / "out")
    exported = FocusLlavaConfig.load(tmp_path / "out")
    assert (exported.vision_sampler.enabled, exported.text_sampler.enabled) == (vision, text)

    # What the command line asks for by default: both samplers on, the checkpoint's own threshold.
    pipeline = EncoderPipeline.from_checkpoint(tmp_path / "out", dtype=torch.float32)
    engine = Engine.from_checkpoint(tmp_path / "out", dtype=torch.float32, kv_cache_bytes=1 << 23)
    (tokens,) = pipeline.encode([pipeline.prepare(picture(5, (56, 56)))], [True])
    assert (len(tokens.tokens_ND) < tokens.uncompressed_tokens == 88) == vision
    turn = ChatTurn(role="user", parts=(ImagePart(image=0), TextPart(text="What number is on the red card?")))
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
    first = JointTask(tiny_run(str(tmp_path / "first")))
    first.export(tmp_path / "first")
    run = tiny_run(str(tmp_path / "out"), stage=stage, **({"init_from": str(tmp_path / "first")} if init else {}))
    JointTask(run).export(tmp_path / "out")
    assert FocusLlavaConfig.load(tmp_path / "first").vision_sampler.enabled
    assert FocusLlavaConfig.load(tmp_path / "out").vision_sampler.enabled == enabled


@pytest.mark.parametrize("sampler", ["vision_sampler", "text_sampler"])
def test_a_sampler_is_not_trained_and_switched_off_at_once(tmp_path, sampler):
    model = {**MODEL, sampler: {**MODEL[sampler], "enabled": False}}
    with pytest.raises(InvalidInput, match=rf"stage.model.{sampler}.enabled: is false, and stage\.\w+.* trains it"):
        JointTask(tiny_run(str(tmp_path / "out"), stage={"model": model}))


def picture(seed, size_wh):
    pixels = torch.randint(0, 256, (size_wh[1], size_wh[0], 3), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(seed))  # fmt: skip
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("order", ["region", "row"])
@pytest.mark.parametrize("base_tile", ["keep", "sample", "drop"])
@pytest.mark.parametrize("pruned", [False, True])
def test_serving_emits_and_reports_what_the_loops_say(tmp_path, base_tile, pruned, order):
    folder, side, layers, prune_layer = tmp_path / "checkpoint", 4, 3, 1
    sampler = VisionSamplerConfig(
        base_grid=(side, side), similarity="normalized", region_pool="max", base_tile=base_tile, window=2,
        branches=((1, 1), (2, 2)), balance_coefficients=(1.0, 1.0), token_order=order,
    )  # fmt: skip
    text_sampler = TextSamplerConfig(layer=prune_layer, threshold=0.5, enabled=pruned)
    make_random_checkpoint(folder, layers=layers, vision_sampler=sampler, text_sampler=text_sampler)
    pipeline = EncoderPipeline.from_checkpoint(folder)
    engine = Engine.from_checkpoint(folder, kv_cache_bytes=1 << 23)
    images = [pipeline.prepare(picture(seed, size_wh)) for seed, size_wh in ((0, (56, 40)), (1, (80, 30)))]
    encoded: list[CompressedVisualTokens] = pipeline.encode(images, [True, True])
    with torch.inference_mode():
        maps = pipeline.model.project([image.tiles for image in images])
    linear, newline = pipeline.model.vision_guided_sampler.selector.linear, pipeline.model.image_newline.tolist()
    chooser = oracle.Selection(weight=linear.weight.tolist(), bias=linear.bias.tolist(), similarity="normalized",
                               region_pool="max")  # fmt: skip
    uncompressed = 0
    for features, tokens in zip(maps, encoded, strict=True):
        base, grid = features.base_PD.tolist(), features.map_HWD.tolist()

        def sampled(of, base=base):
            chosen = oracle.likeliest(oracle.probabilities(of, base, 2, chooser))
            return oracle.tokens(of, newline, 2, sampler.branches, chosen, order), chosen

        square = [base[row * side : (row + 1) * side] for row in range(side)]
        first = {"keep": base, "sample": sampled(square)[0], "drop": []}[base_tile]
        expected, chosen = sampled(grid)
        torch.testing.assert_close(tokens.tokens_ND, torch.tensor([*first, *expected]), rtol=1e-4, atol=1e-4)
        assert tokens.branch_ids_M.tolist() == chosen and len(set(chosen)) == 2
        assert tokens.uncompressed_tokens == side * side + len(grid) * (len(grid[0]) + 1)
        assert tokens.map_hw == (len(grid), len(grid[0]))
        uncompressed += tokens.uncompressed_tokens

    parts = (ImagePart(image=0), ImagePart(image=1), TextPart(text="Which word is written above?"))
    turns = (ChatTurn(role="user", parts=parts),)
    sampling = SamplingParams(max_tokens=1, ignore_eos=True)
    engine.submit(GenerateRequest(request_id="r", turns=turns, images=tuple(encoded), sampling=sampling))
    events = []
    while engine.has_work():
        events += engine.step()
    usage = events[-1][1].usage
    total = sum(len(tokens.tokens_ND) for tokens in encoded)
    assert (usage.visual_tokens_uncompressed, usage.visual_tokens_sampled) == (uncompressed, total)
    assert (usage.visual_tokens_kept < total) == pruned
    seen = [total] * prune_layer + [usage.visual_tokens_kept] * (layers - prune_layer)
    assert usage.converted_visual_tokens == pytest.approx(sum(seen) / layers)
    assert usage.converted_share == pytest.approx(sum(seen) / layers / uncompressed)
