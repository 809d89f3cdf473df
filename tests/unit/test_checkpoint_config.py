"""A checkpoint's config refuses samplers that cannot be, and names the field and the value."""

import dataclasses

import pytest

from services.checkpoint.config import FocusLlavaConfig, TextSamplerConfig, VisionSamplerConfig
from services.common.errors import InvalidInput
from tests.tiny_checkpoints import grid_pinpoints, text_fields, vision_fields


def config(**sampler) -> FocusLlavaConfig:
    return FocusLlavaConfig(
        vision=vision_fields(width=32, layers=2, tile_px=28, patch_px=7),
        text=text_fields("llama", hidden=32, layers=4, heads=2, kv_heads=1, context=256),
        image_token_id=4,
        image_grid_pinpoints=grid_pinpoints(28),
        vision_sampler=dataclasses.replace(VisionSamplerConfig(base_grid=(4, 4)), **sampler),
        text_sampler=TextSamplerConfig(layer=1),
    )


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ({"window": 0}, r"window: is 0"),
        ({"window": -4}, r"window: is -4"),
        ({"branches": (), "balance_coefficients": ()}, "branches: is empty"),
        ({"balance_coefficients": (0, 0, 0)}, r"balance_coefficients: is \(0, 0, 0\)"),
        ({"balance_coefficients": (1, -1, 0)}, r"balance_coefficients: is \(1, -1, 0\)"),
        ({"balance_coefficients": (1, 1)}, "has 2 values for 3 branches"),
        ({"selector_temperature": 0}, "selector_temperature: is 0"),
        ({"branches": ((1, 1), (2, 2), (0, 4))}, r"branches: has \(0, 4\)"),
        ({"branches": ((1, 1), (2, 2), (3, 3))}, r"branches: has \(3, 3\), which does not divide"),
    ],
)
def test_a_sampler_that_cannot_be_is_refused(sampler, message):
    with pytest.raises(InvalidInput, match=message):
        config(**sampler)


def test_the_choice_of_instruction_tokens_is_kept_and_the_default_is_not_written():
    default = config()
    assert "instruction" not in default.to_dict()["text_sampler"], "older checkpoints would change their fingerprints"
    chosen = dataclasses.replace(default, text_sampler=TextSamplerConfig(layer=1, instruction="to_answer"))
    assert FocusLlavaConfig.from_dict(chosen.to_dict()) == chosen
    raw = default.to_dict()
    raw["text_sampler"]["instruction"] = "words"
    with pytest.raises(InvalidInput, match=r"text_sampler.instruction: is 'words', expected one of last_turn"):
        FocusLlavaConfig.from_dict(raw)


def test_the_order_of_sampled_tokens_is_kept_and_the_default_is_not_written():
    assert "token_order" not in config().to_dict()["vision_sampler"], (
        "older checkpoints would change their fingerprints"
    )
    chosen = config(token_order="row")
    assert FocusLlavaConfig.from_dict(chosen.to_dict()) == chosen
    raw = chosen.to_dict()
    raw["vision_sampler"]["token_order"] = "column"
    with pytest.raises(InvalidInput, match=r"vision_sampler.token_order: is 'column', expected one of region, row"):
        FocusLlavaConfig.from_dict(raw)


def test_keep_or_drop_of_single_tokens_is_a_sampler():
    kept = config(window=1, branches=((1, 1), (0, 0)), balance_coefficients=(1, 1))
    assert FocusLlavaConfig.from_dict(kept.to_dict()) == kept
