"""Rivals in the model against one question at a time, with plain attention and tokens physically taken out."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.common.errors import InvalidInput
from tests.llm_reference import causal_mask
from tests.tiny_training import tiny_run
from training.experiments.rivals.joint import RivalCut, encode_with_rival
from training.experiments.rivals.registry import layer_rival, map_rival
from training.experiments.task import ExperimentTask


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    torch.manual_seed(3)
    built = ExperimentTask(tiny_run(str(tmp_path_factory.mktemp("joint") / "out")))
    built.module.eval()
    built.module.schedule = None
    return built


def rotate(x, angle):
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * angle.cos() + turned * angle.sin()


def alone(lm, encoded, sample, branch, rival):
    """Runs one question: words, visual tokens, question and answer; every head and every token by itself."""
    decoder = lm.model
    visual, before = encoded.tokens_ND, len(sample.prefix_ids)
    words = decoder.embed_tokens(torch.tensor([*sample.prefix_ids, *branch.token_ids]))
    hidden = torch.cat((words[:before], visual, words[before:]))
    position = list(range(len(hidden)))
    is_visual = [False] * before + [True] * len(visual) + [False] * len(branch.token_ids)
    total, counts = len(visual), []
    prompt_end = before + total + branch.answer_start - 1
    asked = [i for i, on in enumerate(branch.instruction) if on][-1] + before + total
    asker = prompt_end if rival.asks == "last_prompt_token" else asked
    config = lm.config
    inverse = config.rope_parameters["rope_theta"] ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
    stages = dict(rival.stages)
    for index, layer in enumerate(decoder.layers):
        attention = layer.self_attn
        angle = torch.tensor(position, dtype=torch.float32).unsqueeze(1) * torch.cat((inverse, inverse))
        if index in stages:
            normed = layer.input_layernorm(hidden)
            query = attention.q_proj(normed).unflatten(-1, (-1, config.head_dim))
            key = attention.k_proj(normed).unflatten(-1, (-1, config.head_dim))
            here = [i for i, on in enumerate(is_visual) if on]
            at = position.index(asker)
            worth = torch.zeros(len(here))
            for h in range(query.shape[1]):
                of = h * key.shape[1] // query.shape[1]
                q = rotate(query[at, h], angle[at])
                scores = torch.stack([q @ rotate(key[i, of], angle[i]) for i in here]) * attention.scaling
                worth += scores.softmax(0) / query.shape[1]
            keep = -(-round(stages[index] * total * 1e6) // 10**6)
            best = set(sorted(range(len(here)), key=lambda j: (-float(worth[j]), j))[:keep])
            gone = {i for j, i in enumerate(here) if j not in best}
            left = [i for i in range(len(position)) if i not in gone]
            hidden = hidden[left]
            position, is_visual = [position[i] for i in left], [is_visual[i] for i in left]
            counts.append(sum(is_visual))
            angle = angle[left]
        rotary = (angle.cos()[None], angle.sin()[None])
        hidden = layer(hidden[None], attention_mask=causal_mask(len(position)), position_embeddings=rotary)[0]
    return decoder.norm(hidden)[-len(branch.token_ids) :], counts


@pytest.mark.parametrize("name", ["fastv", "pyramid_drop"])
@pytest.mark.parametrize("asks", ["last_prompt_token", "last_instruction_token"])
def test_a_branch_equals_the_question_alone(task, name, asks):
    model, rival = task.module.model, layer_rival(name, budget=0.6, layers=4, asks=asks)
    samples = [task.data.sample(i) for i in range(3)]
    encoded = model.encode([s.image for s in samples], False)
    sequences, shares = task.module.sequences(samples), []
    lm = AutoModelForCausalLM.from_config(model.config.checkpoint.text_config, attn_implementation="eager").eval()
    lm.load_state_dict(model.language_model.state_dict())
    with torch.no_grad():
        done = model.run(sequences, vision_sampler=False, cut=RivalCut(rival=rival), encoded=encoded)
        together = iter(
            model.language_model.model.norm(done.hidden_SD).split([each.whole for each in done.packed.lengths])
        )
        for b, sample in enumerate(samples):
            for branch in sample.branches:
                expected, counts = alone(lm, encoded[b], sample, branch, rival)
                found = next(together)[-len(branch.token_ids) :]
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
                shares.append(counts[-1] / len(encoded[b].tokens_ND))
        _, metrics = model.training_step(sequences, draw=RivalCut(rival=rival), vision_sampler=False, encoded=encoded)
    assert metrics["kept_share"] == pytest.approx(sum(shares) / len(shares), abs=1e-6) and max(shares) < 0.6


@pytest.mark.parametrize("name", ["top_similarity", "random", "uniform_mean", "visionzip", "prumerge_plus"])
def test_a_map_rival_trains(task, name):
    encoder = task.module.model.encoder
    samples = [task.data.sample(i) for i in range(2)]
    whole = encoder([s.image for s in samples], [False] * 2)
    kept = encode_with_rival(encoder, [s.image for s in samples], map_rival(name, budget=1.0))
    for full, same in zip(whole, kept, strict=True):
        torch.testing.assert_close(full.tokens_ND, same.tokens_ND, rtol=1e-5, atol=1e-5)
    stage = {"vision_sampler": False, "prune": None, "map_rival": {"name": name, "budget": 0.25}}
    module = ExperimentTask(tiny_run("unused", stage=stage)).module
    loss, metrics = module((0, samples), 0)
    loss.backward()
    weight = module.model.encoder.multi_modal_projector.linear_1.weight
    assert weight.grad.abs().sum() > 0 and 0.2 < metrics["sampled_share"] < 0.6


@pytest.mark.parametrize("name", ["visionzip", "prumerge_plus"])
def test_a_rival_reads_the_attention_of_whom_it_is_told(task, name):
    images = [task.data.sample(i).image for i in range(2)]
    of_cls, of_patches = (
        encode_with_rival(task.module.model.encoder, images, map_rival(name, source=source))
        for source in ("cls", "patches")
    )
    assert [e.map_tokens for e in of_cls] == [e.map_tokens for e in of_patches]
    assert any(not torch.equal(a.tokens_ND, b.tokens_ND) for a, b in zip(of_cls, of_patches, strict=True))
    with pytest.raises(InvalidInput, match="'words', expected cls or patches"):
        map_rival(name, source="words")
