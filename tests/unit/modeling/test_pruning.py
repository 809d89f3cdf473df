"""Text-guided pruning in training against naive loops, and what a schedule draws."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto import CONFIG_MAPPING

from services.modeling.loss import IGNORED
from services.modeling.packing import TrainedSequence, pack
from services.modeling.pruning import PruneDraw, PruneSchedule, kept_rows
from tests.tiny_checkpoints import FAMILIES
from tests.unit.sampler import oracles as oracle

IMAGE = 15
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
    """Images have unequal lengths; the words of one branch lie apart, another has one word, another has none."""
    layer, rotary, config = decoder_layer(family)
    sequences = []
    for _ in VISUAL:
        instruction = torch.zeros(WORDS + 1 + 3 * LENGTH, dtype=torch.bool)
        instruction[[WORDS + 1 + t for t in (0, 1, 3, LENGTH + 2)]] = True
        ids = torch.ones(len(instruction), dtype=torch.int64)
        ids[WORDS] = IMAGE
        labels = torch.full_like(ids, IGNORED)
        sequences.append(TrainedSequence(input_ids=ids, labels=labels, instruction=instruction, images=(None,),  # type: ignore[arg-type]
                                         branches=(LENGTH,) * 3))  # fmt: skip
    packed = pack(sequences, VISUAL, image_token_id=IMAGE, device=torch.device("cpu"))
    hidden = torch.randn(len(packed.ids_S), HEADS * HEAD)
    thresholds = (0.6, 0.9, 0.5, 0.3, 1.0, 0.7)
    cos, sin = rotary(hidden[None], packed.position_S[None])
    kept = kept_rows(
        2, layer, hidden, cos[0], sin[0], packed, PruneDraw(layer=2, thresholds=thresholds), [7] * 3 + [4] * 3
    )

    theta, gain = config.rope_parameters["rope_theta"], layer.input_layernorm.weight.tolist()

    def normed(at):
        x = hidden[at].tolist()
        scale = (oracle.mean([v * v for v in x]) + config.rms_norm_eps) ** -0.5
        return [v * scale * g for v, g in zip(x, gain, strict=True)]

    start, found = 0, []
    for b, count in enumerate(VISUAL):
        places = [WORDS + j for j in range(count)]
        keys = [heads_of(layer.self_attn.k_proj, normed(start + at), at, theta) for at in places]
        for q in range(3):
            own = start + WORDS + count + q * LENGTH
            asked = [t for t in range(LENGTH) if packed.instruction_S[own + t]]
            # A branch goes on where its own image ends, wherever it stands in the row.
            queries = [heads_of(layer.self_attn.q_proj, normed(own + t), WORDS + count + t, theta) for t in asked]
            importance = oracle.importance(queries, keys, HEAD**-0.5) if asked else []
            stay = oracle.kept(importance, thresholds[3 * b + q]) if asked else list(range(count))
            rows = [*range(WORDS), *(WORDS + j for j in stay)]
            assert kept[3 * b + q].tolist() == [*(start + row for row in rows), *range(own, own + LENGTH)]
            found.append(len(stay))
        start += WORDS + count + 3 * LENGTH
    assert 0 < found[0] < VISUAL[0] and found[4] == VISUAL[1]


def test_a_schedule_draws_all_that_it_may_and_nothing_else():
    rng, drawn, fixed = random.Random(0), PruneSchedule(), PruneSchedule(layers=(8, 8), thresholds=(0.85, 0.85))
    assert {drawn.draw_layer(rng) for _ in range(2000)} == set(range(8, 25))
    gammas = [drawn.draw_threshold(rng) for _ in range(2000)]
    assert 0.7 <= min(gammas) < 0.71 and 0.99 < max(gammas) <= 1.0
    assert {fixed.draw_layer(rng) for _ in range(9)} == {8} and {fixed.draw_threshold(rng) for _ in range(9)} == {0.85}
