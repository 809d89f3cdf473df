"""One folder for transformers, training and serving: read and written, whole or broken."""

from __future__ import annotations

import importlib
import json
import pathlib
import shutil
import tomllib

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import focusllava
from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.store import MODEL_INDEX, fingerprint, load_stage, verify
from services.common.errors import InvalidInput
from services.llm.engine import Engine
from services.modeling import FocusLlavaForConditionalGeneration, FocusLlavaModelConfig, FocusLlavaProcessor
from services.modeling.images import batched
from services.modeling.pruning import PruneSchedule
from tests.unit.modeling.conversations import batch, checkpoint

ROOT = pathlib.Path(__file__).parents[3]
SHIPPED = ROOT / "checkpoints" / "focusllava-tiny"


def older(source: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The same checkpoint as it was before transformers' index."""
    shutil.copytree(source, folder)
    (folder / MODEL_INDEX).unlink()
    return folder


def tensors(folder):
    return {**load_stage(folder, "encoder"), **load_stage(folder, "llm")}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("indexed", [True, False], ids=["indexed", "older"])
def test_what_is_read_and_saved_is_the_same_checkpoint(tmp_path, tied, indexed):
    source = checkpoint(tmp_path / "source", tied=tied, max_shard_bytes=20_000, dtype="bfloat16")
    folder = source if indexed else older(source, tmp_path / "older")
    model, loading = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    assert isinstance(model, FocusLlavaForConditionalGeneration) and model.dtype == torch.bfloat16
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is table) == tied and model.config.name_or_path == str(folder)
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("llm-*.safetensors"))) > 1
    expected, saved = tensors(source), tensors(tmp_path / "saved")
    assert expected.keys() == saved.keys() and all(torch.equal(expected[name], saved[name]) for name in expected)
    assert (tmp_path / "saved" / "config.json").read_text() == (source / "config.json").read_text()
    verify(tmp_path / "saved")
    # Serving reads it, and so does the model again.
    Engine.from_checkpoint(tmp_path / "saved", dtype=torch.float32, kv_cache_bytes=1 << 22)
    again = FocusLlavaForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_saving_with_one_shard_a_stage_keeps_the_fingerprint(tmp_path):
    source = checkpoint(tmp_path / "source", max_shard_bytes=2**30)
    FocusLlavaForConditionalGeneration.from_pretrained(source).save_pretrained(tmp_path / "saved")
    assert fingerprint(tmp_path / "saved") == fingerprint(source)


def test_the_shipped_checkpoints_have_transformers_index():
    for name in ("focusllava-tiny", "focusllava-tiny-start"):
        index = json.loads((ROOT / "checkpoints" / name / MODEL_INDEX).read_text())
        assert index["weight_map"].keys() == tensors(ROOT / "checkpoints" / name).keys()


def test_another_dtype_a_save_over_itself_and_files_beside_it(tmp_path):
    folder = checkpoint(tmp_path / "folder")
    (folder / "notes.txt").write_text("mine")
    model = FocusLlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        model.encoder.image_newline.fill_(1.5)
    model.save_pretrained(folder)
    assert FocusLlavaConfig.load(folder).dtype == "bfloat16" and (folder / "notes.txt").read_text() == "mine"
    assert (folder / "tokenizer.json").is_file() and not list(folder.glob(".saving*"))
    saved = tensors(folder)
    assert (saved["image_newline"] == 1.5).all() and {t.dtype for t in saved.values()} == {torch.bfloat16}
    verify(folder)


def test_a_model_made_anew_and_its_processor_make_a_folder(tmp_path):
    source = checkpoint(tmp_path / "source")
    torch.manual_seed(0)
    model = FocusLlavaForConditionalGeneration(AutoConfig.from_pretrained(source))
    selector = model.encoder.vision_guided_sampler.selector.linear
    assert not selector.weight.any() and selector.bias.tolist() == [0.5, 0, 0]
    assert 0.3 < model.encoder.image_newline.std().item() * 32**0.5 < 3
    model.save_pretrained(tmp_path / "made")
    AutoProcessor.from_pretrained(source).save_pretrained(tmp_path / "made")
    processor = AutoProcessor.from_pretrained(tmp_path / "made")
    assert isinstance(processor, FocusLlavaProcessor)
    inputs = processor([{"role": "user", "content": "Describe the house."}])
    again = FocusLlavaForConditionalGeneration.from_pretrained(tmp_path / "made")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)


def test_config_json_is_the_only_configuration(tmp_path):
    config = FocusLlavaModelConfig.from_pretrained(SHIPPED, dtype="float32")
    assert config.saved() == FocusLlavaConfig.from_dict(
        {**FocusLlavaConfig.load(SHIPPED).to_dict(), "dtype": "float32"}
    )
    config = FocusLlavaModelConfig.of(FocusLlavaConfig.load(SHIPPED))
    config.text_config.vocab_size += 64
    config.save_pretrained(tmp_path)
    assert FocusLlavaConfig.load(tmp_path).text["vocab_size"] == 526 + 64
    with pytest.raises(InvalidInput, match="text_sampler.layer"):
        FocusLlavaModelConfig(**{**config.to_dict(), "text_sampler": {"layer": 9}})


def test_a_broken_folder_is_refused(tmp_path):
    folder = older(checkpoint(tmp_path / "source"), tmp_path / "older")
    (folder / "encoder.safetensors.index.json").unlink()
    with pytest.raises(InvalidInput, match="has no encoder.safetensors.index.json"):
        FocusLlavaForConditionalGeneration.from_pretrained(folder)
    with pytest.raises(InvalidInput, match="max_shard_size"):
        FocusLlavaForConditionalGeneration.from_pretrained(SHIPPED).save_pretrained(
            tmp_path / "x", max_shard_size="big"
        )


def test_forward_has_the_loss_of_the_training_step(tmp_path):
    """Padded tensors as a data collator makes them, and what Trainer passes."""
    folder = checkpoint(tmp_path / "folder")
    model = FocusLlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    sequences = batch(model.config.checkpoint)
    longest = max(len(each.input_ids) for each in sequences)

    def padded(name, value):
        rows = [getattr(each, name) for each in sequences]
        return torch.stack([torch.nn.functional.pad(row, (0, longest - len(row)), value=value) for row in rows])

    pixel_values, image_sizes = batched([image for each in sequences for image in each.images])
    inputs = {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", -100),
        "instruction_mask": padded("instruction", False),
        "attention_mask": torch.stack([torch.arange(longest) < len(each.input_ids) for each in sequences]),
        "pixel_values": pixel_values,
        "image_sizes": image_sizes,
    }
    with torch.no_grad():
        expected, metrics = model.training_step(sequences, draw=None, vision_sampler=True)
        out = model(**inputs, text_sampler=False)
        assert out.logits is None and out.loss.item() == pytest.approx(expected.item(), rel=1e-6)
        halved = model(**inputs, text_sampler=False, num_items_in_batch=2 * metrics["answer_tokens"])
        assert halved.loss.item() == pytest.approx(expected.item() / 2, rel=1e-6)
        pruned = model(**inputs, keep_ratio=0.25).metrics
        assert pruned["kept_tokens"] < 0.5 * pruned["visual_tokens"] and pruned["prune_layer"] == 1
    model.prune_schedule = PruneSchedule(layers=(1, 3), thresholds=(0.3, 0.9))
    with torch.no_grad():
        drawn = [model.train()(**inputs).metrics for _ in range(12)]
        served = model.eval()(**inputs).metrics
    assert {each["prune_layer"] for each in drawn} == {1, 2, 3} and served["prune_layer"] == 1
    assert len({each["kept_share"] for each in drawn}) == 12
    model.prune_schedule = None
    tiles = torch.cat([image.pixels_T3HW for each in sequences for image in each.images])
    with torch.no_grad():
        flat = model(**{**inputs, "pixel_values": tiles}, text_sampler=False)
    assert flat.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for wrong in ({"pixel_values": tiles[:-1]}, {"image_sizes": image_sizes[:-1]}, {"image_sizes": None}):
        with pytest.raises(InvalidInput, match=r"pixel_values|image_sizes|input_ids|image tokens"):
            model(**{**inputs, "pixel_values": tiles, **wrong})


def test_the_packages_names_are_entry_points_of_the_real_ones():
    parts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["focusllava.parts"]
    for name in focusllava._PARTS:
        module, _, attribute = parts[name].partition(":")
        assert getattr(importlib.import_module(module), attribute)
    assert type(AutoConfig.from_pretrained(SHIPPED)) is FocusLlavaModelConfig
