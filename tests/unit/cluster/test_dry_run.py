"""One list decides what is imported and served, and a dry run finds what no list knows."""

from __future__ import annotations

import json
import pathlib
import types
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.auto import CONFIG_MAPPING

from cluster import dry_run as trial
from cluster.dry_run import dry_run
from focusllava.cli import main
from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.import_llava_next import import_llava_next
from services.checkpoint.supported import check_servable
from services.common.errors import InvalidInput
from services.compute.memory import Memory
from services.llm.deployment import LanguageModelSettings
from services.llm.engine import Engine
from tests import tiny_llm
from tests.tiny_checkpoints import make_hub_checkpoint, text_fields


def hub(folder: pathlib.Path, family: str = "llama", **text: Any) -> pathlib.Path:
    """A hub checkpoint of one shard whose text model has these fields."""
    fields = text_fields(family, hidden=64, layers=6, heads=4, kv_heads=2, context=2048)
    del fields["model_type"]
    config = CONFIG_MAPPING[family](**{**fields, **text})
    return make_hub_checkpoint(folder / "hub", family, max_shard_bytes=10**9, text_config=config)


def edit_text(hub: pathlib.Path, **changes: Any) -> None:
    raw = json.loads((hub / "config.json").read_text())
    raw["text_config"].update(changes)
    (hub / "config.json").write_text(json.dumps(raw))


def rope(rope_type: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10_000.0, **fields}}


LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"head_dim": 32}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"sliding_window": 2048}),
        ("llama", rope("default", partial_rotary_factor=0.5)),
        ("llama", rope("linear", factor=2.0)),
        ("llama", rope("llama3", **LLAMA3_ROPE)),
        ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=512)),
        ("mistral", {"sliding_window": 4096}),
        ("mistral", {"head_dim": 32}),
        ("qwen2", {"sliding_window": 512, "use_sliding_window": False}),
        ("qwen2", {"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 6}),
    ],
    ids=str,
)
def test_what_is_imported_is_served(family: str, fields: dict[str, Any], tmp_path: pathlib.Path) -> None:
    report = import_llava_next(hub(tmp_path, family, **fields), tmp_path / "ours", dry_run=dry_run)
    assert "the encoder and all 6 layers of 6 answered 2 tokens about an image" in report.notes[-1]
    settings = LanguageModelSettings(checkpoint=str(tmp_path / "ours"))
    assert settings.replica_sizes("cpu", torch.float32).full_images
    engine = Engine.from_checkpoint(tmp_path / "ours", dtype=torch.float32, kv_cache_bytes=2**22)
    ids, text, finished = tiny_llm.run(engine, [tiny_llm.request(engine, max_tokens=3)])["r"]
    assert len(ids) == 3 and finished.usage.completion_tokens == 3


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"sliding_window": 512}, "sliding_window: is 512, smaller than max_position_embeddings 2048"),
        ("mistral", {"sliding_window": 512}, "sliding_window: is 512"),
        ("qwen2", {"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 2}, "sliding_window: is 5"),
        ("llama", rope("linear", factor=2.0, partial_rotary_factor=0.5),
         "partial_rotary_factor: is 0.5: of a head's 16 dimensions 8 would be turned"),
        ("llama", rope("yarn", factor=2.0, partial_rotary_factor=0.5), "partial_rotary_factor: is 0.5"),
        ("mistral", rope("llama3", **LLAMA3_ROPE, partial_rotary_factor=0.25), "partial_rotary_factor: is 0.25"),
        ("qwen2", rope("dynamic", factor=2.0), "rope_type: is 'dynamic', expected one of default, linear"),
        ("llama", {"max_position_embeddings": 200}, "max_position_embeddings: is 200, expected 216 or more"),
        ("llama", {"hidden_act": "swoosh"}, "hidden_act: is 'swoosh'"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads: is 3, expected a divisor of the 4"),
    ],
    ids=str,
)  # fmt: skip
def test_one_list_refuses_at_import_and_at_serving(
    family: str, fields: dict[str, Any], message: str, tmp_path: pathlib.Path
) -> None:
    source = hub(tmp_path, family)
    import_llava_next(source, tmp_path / "ours")
    edit_text(source, **fields, **({"layer_types": None} if family == "qwen2" else {}))
    with pytest.raises(InvalidInput) as refused:
        import_llava_next(source, tmp_path / "not ours", dry_run=dry_run)
    assert str(refused.value).startswith(f"config.json text_config.{message}"), refused.value
    assert not (tmp_path / "not ours").exists()
    raw = json.loads((tmp_path / "ours" / "config.json").read_text())
    raw["text"].update(fields)
    raw["text"].pop("layer_types", None)
    (tmp_path / "ours" / "config.json").write_text(json.dumps(raw))
    for refuses in (
        lambda: check_servable(FocusLlavaConfig.load(tmp_path / "ours")),
        lambda: LanguageModelSettings(checkpoint=str(tmp_path / "ours")).replica_sizes("cpu", torch.float32),
        lambda: dry_run(tmp_path / "ours"),
    ):
        with pytest.raises(InvalidInput) as refused:
            refuses()
        assert str(refused.value).startswith(f"text.{message}"), refused.value


def broken_weights(hub: pathlib.Path, name: str) -> None:
    tensors = load_file(hub / "model.safetensors")
    tensors[name][0] = float("nan")
    save_file(tensors, hub / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("language_model.model.layers.5.mlp.down_proj.weight", "dry run: the new checkpoint cannot answer: "),
        ("multi_modal_projector.linear_2.bias", "encoder: makes visual tokens that are not finite"),
        ("template", "chat_template: does not place each image exactly once"),
    ],
)
def test_what_only_running_it_shows_ends_the_import(name: str, message: str, tmp_path: pathlib.Path) -> None:
    source = make_hub_checkpoint(tmp_path / "hub", max_shard_bytes=10**9)
    import_llava_next(source, tmp_path / "ours", dry_run=dry_run)
    before = (tmp_path / "ours" / "config.json").read_bytes()
    if name == "template":
        words = "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"
        (source / "chat_template.json").write_text(json.dumps({"chat_template": words}))
    else:
        broken_weights(source, name)
    for folder in ("ours", "new"):
        with pytest.raises(InvalidInput) as refused:
            import_llava_next(source, tmp_path / folder, dry_run=dry_run)
        assert message in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "ours"]
    assert (tmp_path / "ours" / "config.json").read_bytes() == before


def test_little_memory_runs_fewer_layers_or_says_that_it_ran_none(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_llava_next(make_hub_checkpoint(tmp_path / "hub", "qwen2"), tmp_path / "ours")
    monkeypatch.setattr(trial, "size_encoder", lambda *a, **k: types.SimpleNamespace(bytes=0))
    stored = 6 * 10**5  # two layers in float32, embeddings and head
    monkeypatch.setattr(trial, "choose_dtype", lambda name, device: torch.float32)
    monkeypatch.setattr(trial, "device_memory", lambda device: Memory(total=2 * stored, free=2 * stored))
    assert "the first 2 layers of 6 answered 2 tokens" in dry_run(tmp_path / "ours")
    monkeypatch.setattr(trial, "device_memory", lambda device: Memory(total=1000, free=1000))
    assert dry_run(tmp_path / "ours").startswith("not tried: 500 bytes, half of the memory that is free")


def test_the_command_tells_what_was_run(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_hub_checkpoint(tmp_path / "hub")
    assert main(["import", str(source), str(tmp_path / "ours")]) == 0
    assert "note: tried on " in capsys.readouterr().out
    edit_text(source, sliding_window=512)
    assert main(["import", str(source), str(tmp_path / "ours")]) == 3
    assert "text_config.sliding_window: is 512" in capsys.readouterr().err
