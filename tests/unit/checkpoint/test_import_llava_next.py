"""Importing LLaVA-NeXT checkpoints: every tensor arrives, in little memory, and files of every age are understood."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor

from services.checkpoint.config import FocusLlavaConfig, VisionSamplerConfig
from services.checkpoint.import_llava_next import expected_shapes, import_llava_next
from services.checkpoint.store import LM_HEAD, load_stage, verify
from services.common.errors import InvalidInput
from services.encoder.model import EncoderModel
from services.encoder.pipeline import EncoderPipeline
from services.llm.engine import Engine
from tests.hub_edits import edit_json, edit_weights
from tests.tiny_checkpoints import CHAT_TEMPLATES, EOS, FAMILIES, make_hub_checkpoint, make_tokenizer

ROOT = pathlib.Path(__file__).parents[3]


def hub_tensors(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("layout", ["hub", "new"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_arrives_under_its_name(family: str, layout: str, tmp_path: pathlib.Path) -> None:
    hub = make_hub_checkpoint(tmp_path / "hub", family, layout=layout)
    assert len(list(hub.glob("*.safetensors"))) > 3
    seen: list[tuple[int, int]] = []
    report = import_llava_next(hub, tmp_path / "ours", max_shard_bytes=150_000, progress=lambda *a: seen.append(a))
    ours = {**load_stage(tmp_path / "ours", "encoder"), **load_stage(tmp_path / "ours", "llm")}
    fresh = {name for name in ours if name.startswith("vision_guided_sampler.")}
    theirs = hub_tensors(hub)

    def hub_name(name: str) -> str:
        if layout == "hub":
            return name.replace("vision_tower.", "vision_tower.vision_model.")
        if name == LM_HEAD:
            return "lm_head.weight"
        new = "model." + name.replace("language_model.model.", "language_model.")
        return new.replace("vision_tower.", "vision_tower.vision_model.")

    assert {hub_name(name) for name in ours.keys() - fresh} == theirs.keys()
    assert all(torch.equal(ours[name], theirs[hub_name(name)]) for name in ours.keys() - fresh)
    assert report.tensors_used == len(theirs) and report.tensors_unused == ()
    assert report.fingerprint == verify(tmp_path / "ours")
    assert report.bytes == sum(tensor.nbytes for tensor in ours.values())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and len(seen) == len(theirs)
    assert seen[-1] == (sum(tensor.nbytes for tensor in theirs.values()),) * 2


def test_the_shapes_checked_are_the_encoders(tmp_path: pathlib.Path) -> None:
    for sampler in (VisionSamplerConfig(base_grid=(4, 4)), VisionSamplerConfig(selector_input="region")):
        hub = tmp_path / "hub"
        if not hub.exists():
            make_hub_checkpoint(hub)
        import_llava_next(hub, tmp_path / "ours", vision_sampler=sampler)
        config = FocusLlavaConfig.load(tmp_path / "ours")
        encoder = {name: tuple(tensor.shape) for name, tensor in EncoderModel(config).state_dict().items()}
        assert {name: s for name, s in expected_shapes(config).items() if not name.startswith("lang")} == encoder
        assert config.vision_sampler == sampler
        EncoderPipeline.from_checkpoint(tmp_path / "ours")


def test_config_tokenizer_and_defaults(tmp_path: pathlib.Path) -> None:
    hub = make_hub_checkpoint(tmp_path / "hub", "mistral", layers=12, dtype="float16")
    edit_json(hub / "preprocessor_config.json", image_mean=[0.5, 0.25, 0.125], image_std=[0.3, 0.2, 0.1])
    report = import_llava_next(hub, tmp_path / "ours")
    config = FocusLlavaConfig.load(tmp_path / "ours")
    tokenizer = make_tokenizer("mistral")
    assert config.text_sampler.enabled and (config.text_sampler.layer, config.text_sampler.threshold) == (3, 0.85)
    assert not config.vision_sampler.enabled and config.vision_sampler.base_grid == (4, 4)
    assert any("finetune.py" in note for note in report.notes)
    assert any("1 of 3 layers are stored but never run" in note for note in report.notes)
    assert (config.image_mean, config.image_std) == ((0.5, 0.25, 0.125), (0.3, 0.2, 0.1))
    assert config.dtype == "float16"
    assert config.image_token_id == tokenizer.convert_tokens_to_ids("<image>")
    assert config.eos_token_ids == (tokenizer.eos_token_id,)
    assert config.text_config.vocab_size % 64 == 0 and config.text_config.vocab_size > len(tokenizer)
    assert config.text_config.rope_parameters["rope_theta"] == 10000.0
    assert config.image_grid_pinpoints == ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))
    assert load_stage(tmp_path / "ours", "encoder")["image_newline"].dtype == torch.float16
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (hub / name).read_bytes()
    assert str(report).startswith(f"{report.tensors_used} tensors, ")


def test_fields_of_old_files_are_understood(tmp_path: pathlib.Path) -> None:
    """llava-hf's config.json has rope_theta and torch_dtype, and only what differs from the library's defaults."""
    hub = make_hub_checkpoint(tmp_path / "hub")
    raw = json.loads((hub / "config.json").read_text())
    text = {name: raw["text_config"][name] for name in (
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
    )}  # fmt: skip
    del raw["dtype"]
    raw["text_config"] = {**text, "rope_theta": 500000.0, "torch_dtype": "float32", "_name_or_path": "x"}
    (hub / "config.json").write_text(json.dumps({**raw, "torch_dtype": "float32", "use_image_newline_parameter": True}))
    import_llava_next(hub, tmp_path / "ours")
    config = FocusLlavaConfig.load(tmp_path / "ours")
    assert config.dtype == "float32" and config.text_config.rope_parameters["rope_theta"] == 500000.0
    assert "_name_or_path" not in config.text
    Engine.from_checkpoint(tmp_path / "ours", kv_cache_bytes=2**20)


@pytest.mark.parametrize("eos", [7, [7, 9]])
def test_end_tokens_of_generation_config_and_tokenizer_are_joined(eos: Any, tmp_path: pathlib.Path) -> None:
    hub = make_hub_checkpoint(tmp_path / "hub")
    edit_json(hub / "generation_config.json", eos_token_id=eos)
    import_llava_next(hub, tmp_path / "ours")
    own = make_tokenizer("llama").convert_tokens_to_ids(EOS["llama"])
    wanted = {own, *(eos if isinstance(eos, list) else [eos])}
    assert FocusLlavaConfig.load(tmp_path / "ours").eos_token_ids == tuple(sorted(wanted))


@pytest.mark.parametrize("file", ["chat_template.json", "chat_template.jinja", "tokenizer_config.json"])
def test_chat_template_is_found(file: str, tmp_path: pathlib.Path) -> None:
    hub = make_hub_checkpoint(tmp_path / "hub", chat_template_in=file)
    if file == "chat_template.json":  # the processor's comes before the tokenizer's
        (hub / "chat_template.jinja").write_text("the tokenizer's")
    import_llava_next(hub, tmp_path / "ours")
    engine = Engine.from_checkpoint(tmp_path / "ours", kv_cache_bytes=2**20)
    assert engine.renderer.tokenizer.chat_template == CHAT_TEMPLATES["llama"]


def _several_templates(hub: pathlib.Path, *names: str) -> None:
    """Templates by name, as older tokenizers saved them."""
    named = [{"name": name, "template": CHAT_TEMPLATES["llama"] if name == "default" else "other"} for name in names]
    edit_json(hub / "tokenizer_config.json", chat_template=named)


def test_of_several_chat_templates_the_default_is_taken(tmp_path: pathlib.Path) -> None:
    hub = make_hub_checkpoint(tmp_path / "hub", chat_template_in="tokenizer_config.json")
    _several_templates(hub, "rag", "default")
    import_llava_next(hub, tmp_path / "ours")
    engine = Engine.from_checkpoint(tmp_path / "ours", kv_cache_bytes=2**20)
    assert engine.renderer.tokenizer.chat_template == CHAT_TEMPLATES["llama"]
    _several_templates(hub, "rag", "tool_use")
    with pytest.raises(InvalidInput, match=r"chat_template: is \[\{'name': 'rag'.* expected one of them named default"):
        import_llava_next(hub, tmp_path / "ours")


def test_a_processor_saved_by_transformers_into_an_old_folder_is_read_as_transformers_reads_it(
    tmp_path: pathlib.Path,
) -> None:
    """It nests the image processor in processor_config.json, and the older file stays beside it."""
    hub = make_hub_checkpoint(tmp_path / "hub")
    processor = AutoProcessor.from_pretrained(hub)
    processor.image_processor.image_mean, processor.image_processor.image_std = [0.5, 0.25, 0.125], [0.3, 0.2, 0.1]
    processor.save_pretrained(hub)
    assert "image_processor" in json.loads((hub / "processor_config.json").read_text())
    theirs = AutoProcessor.from_pretrained(hub).image_processor
    for older in (True, False):
        if not older:
            (hub / "preprocessor_config.json").unlink()
        import_llava_next(hub, tmp_path / "ours")
        config = FocusLlavaConfig.load(tmp_path / "ours")
        assert config.image_mean == tuple(theirs.image_mean) == (0.5, 0.25, 0.125)
        assert config.image_std == tuple(theirs.image_std) == (0.3, 0.2, 0.1)


@pytest.mark.parametrize(
    "settings",
    [
        dict.fromkeys(("do_convert_rgb", "do_center_crop", "resample", "size", "crop_size", "image_grid_pinpoints")),
        {"size": 28, "crop_size": 28},
        {"size": {"longest_edge": None, "shortest_edge": 28}, "crop_size": [28, 28]},
    ],
    ids=["null", "whole numbers", "partly null"],
)
def test_null_settings_are_absent_and_sizes_have_many_forms(settings: dict[str, Any], tmp_path: pathlib.Path) -> None:
    hub = make_hub_checkpoint(tmp_path / "hub")
    edit_json(hub / "preprocessor_config.json", **settings)
    import_llava_next(hub, tmp_path / "ours")
    assert FocusLlavaConfig.load(tmp_path / "ours").tile_px == 28


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_dtype_of_auto_is_that_of_the_tensors(name: str, tmp_path: pathlib.Path) -> None:
    hub = make_hub_checkpoint(tmp_path / "hub", dtype="float16")
    raw = json.loads((hub / "config.json").read_text())
    for part in (raw, raw["text_config"], raw["vision_config"]):
        part.pop("dtype", None)
        part[name] = "auto"
    (hub / "config.json").write_text(json.dumps(raw))
    import_llava_next(hub, tmp_path / "ours")
    assert FocusLlavaConfig.load(tmp_path / "ours").dtype == "float16"


def test_sizes_that_are_the_librarys_defaults_are_written_all_the_same(tmp_path: pathlib.Path) -> None:
    hub = make_hub_checkpoint(tmp_path / "hub", tile_px=224, patch_px=32)
    import_llava_next(hub, tmp_path / "ours")
    config = FocusLlavaConfig.load(tmp_path / "ours")
    assert (config.tile_px, config.patches_per_side) == (224, 7)


def test_what_is_not_used_is_reported(tmp_path: pathlib.Path) -> None:
    hub = make_hub_checkpoint(tmp_path / "hub", max_shard_bytes=10**9)
    buffers = {
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    edit_weights(hub, lambda tensors: tensors.update(buffers))
    report = import_llava_next(hub, tmp_path / "ours")
    assert report.tensors_unused == tuple(sorted(buffers))
    assert report.tensors_used == len(hub_tensors(hub)) - 2


def test_a_tied_head_may_be_absent(tmp_path: pathlib.Path) -> None:
    hub = make_hub_checkpoint(tmp_path / "hub", max_shard_bytes=10**9)
    edit_weights(hub, lambda tensors: tensors.pop("language_model.lm_head.weight"))
    with pytest.raises(InvalidInput, match=r"missing: language_model\.lm_head\.weight"):
        import_llava_next(hub, tmp_path / "ours")
    edit_json(hub / "config.json", tie_word_embeddings=True)
    import_llava_next(hub, tmp_path / "ours")
    decoder = Engine.from_checkpoint(tmp_path / "ours", dtype=torch.float32, kv_cache_bytes=2**20).decoder
    embeddings = hub_tensors(hub)["language_model.model.embed_tokens.weight"].float()
    hidden = torch.randn(3, embeddings.shape[1])
    torch.testing.assert_close(decoder.lm.lm_head(hidden), hidden @ embeddings.T)


_MEASURED = """
import pathlib, re, sys
from services.checkpoint.import_llava_next import import_llava_next
def resident_bytes(field):  # of this process alone; getrusage's peak would include what its parent held
    return int(re.search(field + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
small, large, out = map(pathlib.Path, sys.argv[1:])
import_llava_next(small, out / "warm")  # everything is imported and warm now
before = resident_bytes("VmRSS")
report = import_llava_next(large, out / "ours", max_shard_bytes=32 * 2**20)
print(report.bytes, resident_bytes("VmHWM") - before)
"""


def test_a_large_checkpoint_is_imported_in_little_memory(tmp_path: pathlib.Path) -> None:
    small = make_hub_checkpoint(tmp_path / "small")
    large = make_hub_checkpoint(
        tmp_path / "large", hidden=1024, intermediate=4096, layers=5, dtype="bfloat16", max_shard_bytes=100 * 2**20
    )
    command = [sys.executable, "-c", _MEASURED, str(small), str(large), str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    written, growth = map(int, result.stdout.split())
    assert written > 150e6
    # One output shard of 32 MiB, one input tensor of 8 MiB, and slack.
    assert growth < 64 * 2**20, f"importing {written / 1e6:.0f} MB took {growth / 1e6:.0f} MB of memory"
