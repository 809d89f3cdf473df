"""The text-guided sampler against naive loops and hand-computed cases, in training too; what a schedule draws."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto import CONFIG_MAPPING

from services.sampler.text_guided import apply_rotary, keep_by_ratio, keep_by_share, text_importance
from tests.tiny_checkpoints import FAMILIES
from tests.unit.sampler import oracles as oracle
from training.layout import positions
from training.stochastic_prune import PruneSchedule, decide, gather_index


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
def test_importance_equals_the_naive_loop(heads, groups):
    torch.manual_seed(0)
    query, key, scaling = torch.randn(5, heads, 8), torch.randn(11, groups, 8), 8**-0.5
    expected = torch.tensor(oracle.importance(query.tolist(), key.tolist(), scaling))
    torch.testing.assert_close(text_importance(query, key, scaling), expected)


@pytest.mark.parametrize("threshold", [0.01, 0.3, 0.5, 0.85, 0.99, 1.0])
def test_selection_equals_the_naive_loop(threshold):
    torch.manual_seed(1)
    for _ in range(20):
        importance = torch.rand(37).double()
        assert keep_by_share(importance, threshold).tolist() == oracle.kept(importance.tolist(), threshold)
        tied = torch.randint(1, 4, (37,)).double()
        assert keep_by_share(tied, threshold).tolist() == oracle.kept(tied.tolist(), threshold)


def test_selection_by_hand():
    importance = torch.tensor([0.1, 0.4, 0.2, 0.3])
    assert keep_by_share(importance, 0.7).tolist() == [1, 3]
    assert keep_by_share(importance, 0.71).tolist() == [1, 2, 3]
    assert keep_by_share(importance, 1.0).tolist() == [0, 1, 2, 3]
    assert keep_by_share(torch.ones(4), 0.5).tolist() == [0, 1]
    assert keep_by_share(torch.zeros(0), 0.5).tolist() == []


@pytest.mark.parametrize(("ratio", "count"), [(1.0, 30), (0.75, 23), (0.5, 15), (0.1, 3), (0.7, 21), (1e-9, 1)])
def test_a_ratio_keeps_that_share_rounded_up_and_the_most_important(ratio, count):
    importance = torch.rand(30, generator=torch.Generator().manual_seed(2))
    kept = keep_by_ratio(importance, ratio).tolist()
    assert kept == sorted(sorted(range(30), key=lambda j: -importance[j])[:count])


def test_a_ratio_by_hand():
    assert keep_by_ratio(torch.tensor([0.1, 0.4, 0.2, 0.4]), 0.25).tolist() == [1]
    assert keep_by_ratio(torch.tensor([0.1, 0.4, 0.2, 0.4]), 0.51).tolist() == [1, 2, 3]
    assert keep_by_ratio(torch.ones(4), 0.5).tolist() == [0, 1]
    assert keep_by_ratio(torch.zeros(0), 0.5).tolist() == []


def test_rotary_equals_the_decoders_own():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    query, angle = torch.randn(1, 3, 7, 8), torch.rand(1, 7, 8)
    expected, _ = apply_rotary_pos_emb(query, query, angle.cos(), angle.sin())
    ours = apply_rotary(query[0].transpose(0, 1), angle[0].cos(), angle[0].sin())
    torch.testing.assert_close(ours, expected[0].transpose(0, 1))


HEADS, GROUPS, HEAD = 4, 2, 4
WORDS, VISUAL, LENGTH = 2, (7, 4), 5
"""Words before the image, visual tokens of each image, tokens of a branch."""


def decoder_layer(family):
    """One decoder layer of a family and the rotary embedding that it is given."""
    torch.manual_seed(4)
    config = CONFIG_MAPPING[family](
        hidden_size=HEADS * HEAD, intermediate_size=8, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, head_dim=HEAD, vocab_size=16, initializer_range=0.5, attention_bias=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).model
    for parameter in model.layers[0].parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter)
    return model.layers[0], model.rotary_emb, config


def heads_of(projection, normed, position, theta):
    """One token's query or key, head by head, turned."""
    bias = projection.bias.tolist() if projection.bias is not None else [0.0] * projection.out_features
    flat = [oracle.dot(row, normed) + b for row, b in zip(projection.weight.tolist(), bias, strict=True)]
    return [oracle.turned(flat[at : at + HEAD], position, theta) for at in range(0, len(flat), HEAD)]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_training_prunes_equals_the_naive_loop(family):
    """Images have unequal lengths; the words of one branch lie apart, another has one word, another is padding."""
    layer, rotary, config = decoder_layer(family)
    prefix = WORDS + max(VISUAL)
    hidden = torch.randn(2, prefix + 3 * LENGTH, HEADS * HEAD)
    instruction = torch.zeros(2, 3, LENGTH, dtype=torch.bool)
    instruction[:, 0, [0, 1, 3]] = True
    instruction[:, 1, 2] = True
    thresholds = [[0.6, 0.9, 0.5], [0.3, 1.0, 0.7]]
    cos, sin = rotary(hidden, positions(torch.tensor(VISUAL) + WORDS, prefix, 3, LENGTH))
    kept = decide(layer, hidden, cos, sin, instruction, WORDS, list(VISUAL), prefix, thresholds)

    theta, gain = config.rope_parameters["rope_theta"], layer.input_layernorm.weight.tolist()

    def normed(b, at):
        x = hidden[b, at].tolist()
        scale = (oracle.mean([v * v for v in x]) + config.rms_norm_eps) ** -0.5
        return [v * scale * g for v, g in zip(x, gain, strict=True)]

    for b, count in enumerate(VISUAL):
        places = [WORDS + j for j in range(count)]
        keys = [heads_of(layer.self_attn.k_proj, normed(b, at), at, theta) for at in places]
        for q in range(3):
            asked = [t for t in range(LENGTH) if instruction[b, q, t]]
            # A branch goes on where its own image ends, wherever the batch's padding put it.
            queries = [
                heads_of(layer.self_attn.q_proj, normed(b, prefix + q * LENGTH + t), WORDS + count + t, theta)
                for t in asked
            ]
            expected = (
                oracle.kept(oracle.importance(queries, keys, HEAD**-0.5), thresholds[b][q])
                if asked
                else list(range(count))
            )
            assert kept[b][q].tolist() == expected
    assert 0 < len(kept[0][0]) < VISUAL[0] and len(kept[1][1]) == VISUAL[1]

    source, starts = gather_index(kept, WORDS, prefix, LENGTH)
    for row, (b, q) in enumerate((b, q) for b in range(2) for q in range(3)):
        stay = [*range(WORDS), *(WORDS + j for j in kept[b][q].tolist())]
        whole = [*stay, *(prefix + q * LENGTH + t for t in range(LENGTH))]
        assert source[row, : len(whole)].tolist() == whole and starts[row] == len(stay)


def test_a_schedule_draws_all_that_it_may_and_nothing_else():
    rng, drawn, fixed = random.Random(0), PruneSchedule(), PruneSchedule(layers=(8, 8), thresholds=(0.85, 0.85))
    assert {drawn.draw_layer(rng) for _ in range(2000)} == set(range(8, 25))
    gammas = [drawn.draw_threshold(rng) for _ in range(2000)]
    assert 0.7 <= min(gammas) < 0.71 and 0.99 < max(gammas) <= 1.0
    assert {fixed.draw_layer(rng) for _ in range(9)} == {8} and {fixed.draw_threshold(rng) for _ in range(9)} == {0.85}
