"""LLaVA-NeXT checkpoints that cannot be reproduced are refused by name, before anything is written."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from services.checkpoint.import_llava_next import import_llava_next
from services.common.errors import InvalidInput
from tests.hub_edits import INDEX, edit_json, edit_weights
from tests.tiny_checkpoints import make_hub_checkpoint


def test_wrong_tensors_are_named_before_anything_is_written(tmp_path: pathlib.Path) -> None:
    hub = make_hub_checkpoint(tmp_path / "hub", max_shard_bytes=10**9)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["language_model.model.layers.3.mlp.up_proj.weight"]
        tensors["language_model.model.layers.6.mlp.up_proj.weight"] = torch.zeros(2, 2)
        tensors["multi_modal_projector.linear_1.bias"] = torch.zeros(63)

    edit_weights(hub, edit)
    with pytest.raises(InvalidInput) as caught:
        import_llava_next(hub, tmp_path / "ours")
    message = str(caught.value)
    assert "missing: language_model.model.layers.3.mlp.up_proj.weight" in message
    assert "unknown: language_model.model.layers.6.mlp.up_proj.weight" in message
    assert "wrong shape: multi_modal_projector.linear_1.bias [63] instead of [64]" in message
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def _text(**changes: Any) -> Callable[[pathlib.Path], None]:
    def edit(hub: pathlib.Path) -> None:
        text = json.loads((hub / "config.json").read_text())["text_config"]
        edit_json(hub / "config.json", text_config={**text, **changes})

    return edit


def _file(name: str, **changes: Any) -> Callable[[pathlib.Path], None]:
    return lambda hub: edit_json(hub / name, **changes)


def _written(name: str, text: str) -> Callable[[pathlib.Path], object]:
    return lambda hub: (hub / name).write_text(text)


def _pickled(hub: pathlib.Path) -> None:
    (hub / "model.safetensors").rename(hub / "pytorch_model.bin")


def _truncated(hub: pathlib.Path) -> None:
    path = hub / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _outside(hub: pathlib.Path) -> None:
    index = {"weight_map": {"x": "../hub/model.safetensors"}}
    (hub / "model.safetensors.index.json").write_text(json.dumps(index))


def _quantized(hub: pathlib.Path) -> None:
    edit_weights(hub, lambda t: t.update({"language_model.lm_head.weight": torch.zeros(448, 64, dtype=torch.int8)}))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_file("config.json", model_type="llava"), "model_type: is 'llava'"),
        (_file("config.json", vision_feature_select_strategy="full"), "vision_feature_select_strategy: is 'full'"),
        (_file("config.json", vision_feature_layer=[-2, -3]), "vision_feature_layer"),
        (_file("config.json", projector_hidden_act="relu"), "projector_hidden_act: is 'relu'"),
        (_file("config.json", quantization_config={"quant_method": "awq"}), "config.json quantization_config: is {"),
        (_text(quantization_config={"quant_method": "gptq"}), "config.json text_config.quantization_config: is {"),
        (_file("config.json", image_token_index=3000), "image_token_index: is 3000"),
        (_text(sliding_window=512), "sliding_window: is 512, smaller than max_position_embeddings 2048"),
        (_text(model_type="gemma"), "text_config.model_type: is 'gemma'"),
        (_text(hidden_size="wide"), "config.json: is not a LLaVA-NeXT config"),
        (_file("preprocessor_config.json", resample=2), "resample: is 2"),
        (_file("preprocessor_config.json", rescale_factor=1.0), "rescale_factor: is 1.0"),
        (_file("preprocessor_config.json", size={"shortest_edge": 56}), "the vision tower takes 28 px"),
        (
            _file("preprocessor_config.json", image_grid_pinpoints=[[28, 28]]),
            "preprocessor_config.json image_grid_pinpoints: is [[28, 28]], config.json has [[28, 56], [56, 28]",
        ),
        (_file("preprocessor_config.json", image_grid_pinpoints=28), "image_grid_pinpoints: is 28, config.json has"),
        (_file("preprocessor_config.json", image_mean=None), "preprocessor_config.json image_mean: is missing"),
        (_file("preprocessor_config.json", image_std=0.5), "image_std: is 0.5, expected"),
        (_file("preprocessor_config.json", image_mean=[0.5]), "image_mean: is (0.5,), expected"),
        (_file("preprocessor_config.json", rescale_factor="x"), "rescale_factor: is 'x'"),
        (_file("preprocessor_config.json", rescale_factor=float("nan")), "rescale_factor: is nan"),
        (_file("processor_config.json", image_processor=[1]), "processor_config.json image_processor: is [1]"),
        (
            _file("processor_config.json", image_processor={"do_resize": False}),
            "processor_config.json image_processor do_resize: is False",
        ),
        (_file("config.json", vision_feature_layer=-5), "vision_feature_layer: is -5, expected -4..3"),
        (_file("config.json", vision_feature_layer=4), "vision_feature_layer: is 4, expected -4..3"),
        (_file("generation_config.json", eos_token_id=["x"]), "generation_config.json eos_token_id: is ['x']"),
        (_written("generation_config.json", "[1]"), "generation_config.json holds [1], expected an object"),
        (_written("config.json", "[1]"), "config.json holds [1], expected an object"),
        (_written("tokenizer.json", "{}"), "tokenizer.json: cannot be read"),
        (_written("tokenizer.json", "{"), "tokenizer.json: cannot be read"),
        (_written(INDEX, "{}"), f"{INDEX} weight_map: is None, expected an object"),
        (_written(INDEX, '{"weight_map": {"a": 5}}'), f"{INDEX} weight_map: has 5 for a, expected the name"),
        (_file("chat_template.json", chat_template=None), "template"),
        (lambda hub: (hub / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda hub: (hub / "config.json").unlink(), "no config.json"),
        (lambda hub: (hub / "config.json").write_text("{"), "is not JSON"),
        (lambda hub: (hub / "model.safetensors").unlink(), "model.safetensors"),
        (_pickled, "convert it to safetensors first"),
        (_truncated, "not a readable safetensors file"),
        (_outside, "outside its folder"),
        (_quantized, "I8: quantized"),
    ],
)
def test_what_cannot_be_reproduced_is_refused(
    break_it: Callable[[pathlib.Path], Any], message: str, tmp_path: pathlib.Path
) -> None:
    hub = make_hub_checkpoint(tmp_path / "hub", "mistral", max_shard_bytes=10**9)
    break_it(hub)
    with pytest.raises(InvalidInput) as caught:
        import_llava_next(hub, tmp_path / "ours")
    assert message in str(caught.value)
    assert not (tmp_path / "ours").exists()
