"""A checkpoint's config refuses samplers that cannot be, and names the field and the value."""

import copy
import dataclasses
import json
import pathlib

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
        ({"branches": (), "balance_coefficients": ()}, r"branches: is \(\), expected one or more"),
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


NAN = float("nan")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vision_sampler", None, "is None, expected a mapping"),
        ("vision_sampler", [], r"is \[\], expected a mapping"),
        ("vision_sampler.enabled", "false", "is 'false', expected bool"),
        ("vision_sampler.window", "4", "is '4', expected int"),
        ("vision_sampler.window", 4.0, "is 4.0, expected int"),
        ("vision_sampler.window", True, "is True, expected int"),
        ("vision_sampler.branches", [1, 2, 4], r"is 1, expected a list"),
        ("vision_sampler.branches", "abc", "is 'abc', expected"),
        ("vision_sampler.balance_coefficients", [1, "a", 1], "is 'a', expected float"),
        ("vision_sampler.selector_temperature", "3", "is '3', expected float"),
        ("vision_sampler.selector_temperature", NAN, "is nan, expected above 0"),
        pytest.param("vision_sampler.selector_temperature", 10**400, "expected float", id="too large for a float"),
        ("text_sampler", 5, "is 5, expected a mapping"),
        ("text_sampler.layer", "3", "is '3', expected int"),
        ("text_sampler.layer", 3.5, "is 3.5, expected int"),
        ("text_sampler.threshold", "0.9", "is '0.9', expected float"),
        ("text_sampler.threshold", NAN, r"is nan, expected \(0, 1\]"),
        ("image_grid_pinpoints", [28, 56], "is 28, expected a list"),
        ("image_grid_pinpoints", [[28, 56, 28]], r"is \[28, 56, 28\], expected a list of 2"),
        ("image_grid_pinpoints", [], r"is \(\), expected one or more"),
        ("image_grid_pinpoints", [[0, 28]], r"has \(0, 28\), not a multiple of the tile's 28 px"),
        ("image_grid_pinpoints", [[-28, 28]], r"has \(-28, 28\), not a multiple"),
        ("vision", None, "is None, expected a mapping"),
        ("vision.image_size", None, "is None, expected a whole number above 0"),
        ("vision.patch_size", 0, "is 0, expected a whole number above 0"),
        ("vision.patch_size", 29, "is 29, expected at most 28"),
        ("vision.hidden_size", "x", "hidden_size.* got str .value: 'x'"),
        ("text", None, "is None, expected a mapping"),
        ("text.model_type", None, "is None, expected one of llama, mistral, qwen2"),
        ("text.num_hidden_layers", "six", "num_hidden_layers.* got str .value: 'six'"),
        ("text.hidden_size", 31, "hidden size .31. is not a multiple"),
        ("text.num_attention_heads", 0, ""),
        ("vision_feature_layer", -4, r"is -4, expected -3\.\.2"),
        ("vision_feature_layer", 3, r"is 3, expected -3\.\.2"),
        ("vision_feature_layer", "x", "is 'x', expected int"),
        ("eos_token_ids", 2, "is 2, expected a list"),
        ("eos_token_ids", ["a"], "is 'a', expected int"),
        ("image_token_id", "4", "is '4', expected int"),
        ("image_token_id", -1, "is -1, expected 0 or more"),
        ("image_mean", [0.5, 0.5], r"is \[0.5, 0.5\], expected a list of 3"),
        ("image_std", [0, 0, 0], r"is \(0, 0, 0\), expected all above 0"),
        ("projector_bias", "no", "is 'no', expected bool"),
        ("model_type", "llava", "is 'llava', expected 'focusllava'"),
    ],
)
def test_a_wrong_value_in_a_file_is_named(field, value, message):
    raw = copy.deepcopy(config().to_dict())
    part, _, name = field.rpartition(".")
    (raw[part] if part else raw)[name] = value
    with pytest.raises(InvalidInput, match=f"^{part or name}.*: .*{message}"):
        FocusLlavaConfig.from_dict(raw)


def test_a_missing_size_is_named():
    raw = config().to_dict()
    raw["vision"] = {name: value for name, value in raw["vision"].items() if name != "image_size"}
    with pytest.raises(InvalidInput, match="vision.image_size: is None"):
        FocusLlavaConfig.from_dict(raw)


@pytest.mark.parametrize("layer", [-3, -1, 0, 2])
def test_every_layer_of_the_tower_may_be_the_feature_layer(layer):
    assert dataclasses.replace(config(), vision_feature_layer=layer).vision_feature_layer == layer


def test_a_file_that_holds_no_config_is_refused(tmp_path):
    for content, message in ((b"\xff\xfe{}", "is not JSON"), (b"{", "is not JSON"), (b"[1]", r"is \[1\], expected")):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(InvalidInput, match=message):
            FocusLlavaConfig.load(tmp_path)


def test_checkpoints_that_exist_are_read_and_written_as_they_are():
    """Every value keeps its type: a number that changed it would change the fingerprint."""
    for file in (pathlib.Path(__file__).parents[3] / "checkpoints").glob("*/config.json"):
        raw = json.loads(file.read_text("utf8"))
        assert json.dumps(FocusLlavaConfig.from_dict(raw).to_dict(), sort_keys=True) == json.dumps(raw, sort_keys=True)


def test_reduced_jpegs_are_kept_and_the_default_is_not_written():
    assert "reduced_jpeg" not in config().to_dict(), "older checkpoints would change their fingerprints"
    chosen = dataclasses.replace(config(), reduced_jpeg=True)
    assert FocusLlavaConfig.from_dict(chosen.to_dict()) == chosen
    with pytest.raises(InvalidInput, match="reduced_jpeg: is 'yes', expected bool"):
        FocusLlavaConfig.from_dict({**config().to_dict(), "reduced_jpeg": "yes"})


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
