"""Attention that patches receive in the vision tower, against a naive loop and transformers' own CLIP."""

import math

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from services.common.errors import InvalidInput
from training.experiments.rivals.tower import attention_received


@pytest.mark.parametrize("source", ["cls", "patches"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_naive_loop(source, dtype):
    tiles, tokens, heads, head, scaling = 2, 6, 3, 4, 0.5
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(tiles, tokens, heads, head, generator=generator).to(dtype) for _ in range(2))
    asking = [0] if source == "cls" else range(1, tokens)
    expected = torch.zeros(tiles, tokens - 1)
    for t in range(tiles):
        for g in range(heads):
            for i in asking:
                scores = [float(query[t, i, g].double() @ key[t, j, g].double()) * scaling for j in range(tokens)]
                weights = [math.exp(score) for score in scores]
                for j in range(1, tokens):
                    expected[t, j - 1] += weights[j] / sum(weights) / heads / len(asking)
    torch.testing.assert_close(attention_received(query, key, scaling, source), expected)


def test_cls_attention_is_that_of_transformers_clip():
    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3,
                              image_size=16, patch_size=4)  # fmt: skip
    tower = CLIPVisionModel._from_config(config, attn_implementation="eager").eval()
    seen = {}
    attention = tower.encoder.layers[1].self_attn
    for name in ("q_proj", "k_proj"):
        getattr(attention, name).register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
    weights = tower(torch.randn(2, 3, 16, 16), output_attentions=True).attentions[1]
    query, key = (seen[name].unflatten(-1, (3, 8)) for name in ("q_proj", "k_proj"))
    torch.testing.assert_close(attention_received(query, key, attention.scale), weights[:, :, 0, 1:].mean(1))


def test_an_unknown_source_is_refused():
    with pytest.raises(InvalidInput, match="source"):
        attention_received(torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1), 1.0, "words")  # type: ignore[arg-type]
