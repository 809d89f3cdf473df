"""Checkpoint folders: stages apart, atomic, fingerprinted, and damage named."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.store import EMBEDDINGS, LLM_PREFIX, LM_HEAD, fingerprint, index_path, load_stage, verify
from services.checkpoint.writer import CheckpointWriter, save_checkpoint
from services.common.errors import InvalidInput
from services.encoder.model import EncoderModel
from services.encoder.pipeline import EncoderPipeline
from services.llm.engine import Engine
from tests.tiny_checkpoints import FAMILIES, make_random_checkpoint, make_tokenizer

SHARD_BYTES = 100_000


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("store") / "tiny"
    make_random_checkpoint(folder, max_shard_bytes=SHARD_BYTES)
    return folder


@pytest.fixture
def folder(original: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(original, tmp_path / "tiny"))


def expected_shapes(folder: pathlib.Path) -> dict[str, dict[str, torch.Size]]:
    config = FocusLlavaConfig.load(folder)
    with torch.device("meta"):
        encoder, llm = EncoderModel(config), AutoModelForCausalLM.from_config(config.text_config)
    return {
        "encoder": {name: tensor.shape for name, tensor in encoder.state_dict().items()},
        "llm": {LLM_PREFIX + name: tensor.shape for name, tensor in llm.state_dict().items()},
    }


def edit_index(folder: pathlib.Path, stage: str, edit) -> None:
    path = index_path(folder, stage)
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_hold_exactly_their_own_tensors(family: str, tmp_path: pathlib.Path) -> None:
    make_random_checkpoint(tmp_path / "c", family)
    for stage, shapes in expected_shapes(tmp_path / "c").items():
        tensors = load_stage(tmp_path / "c", stage, expected=shapes)
        assert {name: tensor.shape for name, tensor in tensors.items()} == shapes


def test_encoder_loads_with_no_llm_weight_on_disk_and_the_other_way_round(folder: pathlib.Path) -> None:
    kept = fingerprint(folder)
    aside = folder.parent / "aside"
    for stage, other in (("encoder", "llm"), ("llm", "encoder")):
        aside.mkdir()
        for shard in folder.glob(f"{other}-*.safetensors"):
            shard.rename(aside / shard.name)
        if stage == "encoder":
            assert EncoderPipeline.from_checkpoint(folder).fingerprint == kept
        else:
            assert Engine.from_checkpoint(folder, kv_cache_bytes=2**20).fingerprint == kept
        with pytest.raises(InvalidInput, match=f"{other}-00001-of-"):
            load_stage(folder, other)
        for shard in aside.iterdir():
            shard.rename(folder / shard.name)
        aside.rmdir()


def test_no_tensor_is_in_both_stages(original: pathlib.Path) -> None:
    encoder, llm = (load_stage(original, stage) for stage in ("encoder", "llm"))
    assert not encoder.keys() & llm.keys()
    assert all(name.startswith("language_model.") for name in llm)
    assert {name.split(".")[0] for name in encoder} == {
        "vision_tower", "multi_modal_projector", "image_newline", "vision_guided_sampler",
    }  # fmt: skip


def test_saving_what_was_loaded_changes_nothing(original: pathlib.Path, tmp_path: pathlib.Path) -> None:
    encoder, llm = (load_stage(original, stage) for stage in ("encoder", "llm"))
    again = save_checkpoint(tmp_path / "again", FocusLlavaConfig.load(original), encoder, llm, original)
    for stage, before in (("encoder", encoder), ("llm", llm)):
        after = load_stage(tmp_path / "again", stage)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
    assert verify(tmp_path / "again") == again


def test_shards_stay_under_their_limit_and_are_in_hugging_faces_style(original: pathlib.Path) -> None:
    for stage in ("encoder", "llm"):
        index = json.loads(index_path(original, stage).read_text())
        shards = sorted(set(index["weight_map"].values()))
        assert shards == [f"{stage}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        assert shards == sorted(path.name for path in original.glob(f"{stage}-*")) and len(shards) > 1
        tensors = load_stage(original, stage)
        for shard in shards:
            sizes = [tensors[name].nbytes for name, where in index["weight_map"].items() if where == shard]
            assert sum(sizes) <= SHARD_BYTES or len(sizes) == 1
            sha256 = hashlib.sha256((original / shard).read_bytes()).hexdigest()
            assert index["metadata"]["shard_sha256"][shard] == sha256
        assert index["metadata"]["total_size"] == sum((original / shard).stat().st_size for shard in shards)


def test_fingerprint_needs_no_weights_and_follows_config_tokenizer_and_weights(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    first = fingerprint(folder)
    assert len(first) == 64 and set(first) <= set("0123456789abcdef")
    (folder / "README.md").write_text("other words")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    assert fingerprint(folder) == first, "documentation and layout of the JSON do not count"

    config["text_sampler"]["threshold"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    second = fingerprint(folder)
    with (folder / "chat_template.jinja").open("a") as file:
        file.write(" ")
    third = fingerprint(folder)
    other_seed = make_random_checkpoint(tmp_path / "other", seed=1)
    assert len({first, second, third, other_seed}) == 4
    assert make_random_checkpoint(tmp_path / "same", max_shard_bytes=SHARD_BYTES) == first


def test_verify_names_the_corrupt_shard(folder: pathlib.Path) -> None:
    assert verify(folder) == fingerprint(folder)
    shard = sorted(folder.glob("llm-*"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InvalidInput, match=shard.name):
        verify(folder)


def test_damage_is_named(folder: pathlib.Path) -> None:
    shapes = expected_shapes(folder)["encoder"]

    def refuse(text: str, stage: str = "encoder", **kwargs: object) -> None:
        with pytest.raises(InvalidInput, match=text):
            load_stage(folder, stage, **kwargs)

    refuse(r"wrong shape: image_newline \[64\] instead of \[65\]", expected={**shapes, "image_newline": (65,)})
    refuse("missing: extra.weight", expected={**shapes, "extra.weight": (1,)})
    refuse("unknown: image_newline", expected={name: s for name, s in shapes.items() if name != "image_newline"})

    index = index_path(folder, "encoder").read_text()
    edit_index(folder, "encoder", lambda i: i["weight_map"].pop("image_newline"))
    refuse("image_newline: is not in the index")
    index_path(folder, "encoder").write_text(index)
    edit_index(folder, "encoder", lambda i: i["weight_map"].update(ghost=i["weight_map"]["image_newline"]))
    refuse("ghost: is missing")
    index_path(folder, "encoder").write_text("{}")
    refuse("not a checkpoint index")
    index_path(folder, "encoder").unlink()
    refuse("no encoder.safetensors.index.json")

    shard = sorted(folder.glob("llm-*"))[0]
    shard.write_bytes(shard.read_bytes()[:-7])
    refuse("not a readable safetensors", "llm")
    shard.write_bytes(b"\xff" * 100)
    refuse("not a readable safetensors", "llm")
    shard.unlink()
    refuse(shard.name, "llm")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"\xff\xfe{}", "not a checkpoint index: UnicodeDecodeError"),
        (b'{"weight_map": {"a": 5}, "metadata": {"shard_sha256": {"5": "x"}}}', "names a shard 5, expected the name"),
        (b'{"weight_map": {"a": null}, "metadata": {"shard_sha256": {}}}', "names a shard None, expected the name"),
        (b'{"weight_map": {}, "metadata": {"shard_sha256": []}}', "not a checkpoint index"),
        (b"[]", "not a checkpoint index"),
    ],
)
def test_an_index_that_is_none_is_refused(index: bytes, message: str, folder: pathlib.Path) -> None:
    index_path(folder, "llm").write_bytes(index)
    for read in (fingerprint, verify, lambda folder: load_stage(folder, "llm")):
        with pytest.raises(InvalidInput, match=message):
            read(folder)


def test_an_index_cannot_lead_out_of_its_folder_or_stage(folder: pathlib.Path) -> None:
    encoder_shard = next(folder.glob("encoder-*")).name
    for shard in ("../tiny/" + encoder_shard, encoder_shard):
        index = {"metadata": {"shard_sha256": {shard: "0" * 64}}, "weight_map": {"x": shard}}
        index_path(folder, "llm").write_text(json.dumps(index))
        with pytest.raises(InvalidInput, match="not one of stage llm"):
            load_stage(folder, "llm")


def test_a_tied_head_is_stored_once_and_shared_when_loaded(tmp_path: pathlib.Path) -> None:
    make_random_checkpoint(tmp_path / "tied", tied=True)
    assert LM_HEAD not in json.loads(index_path(tmp_path / "tied", "llm").read_text())["weight_map"]
    tensors = load_stage(tmp_path / "tied", "llm", expected=expected_shapes(tmp_path / "tied")["llm"])
    assert tensors[LM_HEAD].data_ptr() == tensors[EMBEDDINGS].data_ptr()


def test_a_failed_save_leaves_the_old_checkpoint_and_nothing_else(folder: pathlib.Path) -> None:
    before = verify(folder)
    with pytest.raises(RuntimeError, match="power cut"):
        with CheckpointWriter(folder, FocusLlavaConfig.load(folder), max_shard_bytes=10) as writer:
            writer.add("image_newline", torch.zeros(64))
            writer.add("multi_modal_projector.linear_1.bias", torch.zeros(64))
            raise RuntimeError("power cut")
    assert verify(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    after = make_random_checkpoint(folder, seed=5)
    assert verify(folder) == after != before
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_where_the_new_checkpoint_cannot_take_its_place_the_old_one_comes_back(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename = verify(folder), pathlib.Path.rename

    def fail(self: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
        # The old one is the only thing whose name is old.
        if target == folder and self.name != "old":
            raise OSError("no space left")
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", fail)
    with pytest.raises(OSError, match="no space left"):
        make_random_checkpoint(folder, seed=5)
    assert verify(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_a_folder_that_is_no_checkpoint_is_never_replaced(original: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InvalidInput, match="not a FocusLLaVA checkpoint"):
        make_random_checkpoint(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_tensors_of_no_stage_and_twice_given_ones_are_refused(original: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with CheckpointWriter(tmp_path / "c", FocusLlavaConfig.load(original)) as writer:
        with pytest.raises(InvalidInput, match=r"text_tower\.weight"):
            writer.add("text_tower.weight", torch.zeros(1))
        writer.add("image_newline", torch.zeros(64))
        with pytest.raises(InvalidInput, match="image_newline: is given twice"):
            writer.add("image_newline", torch.zeros(64))


def test_a_linked_stage_is_not_copied_and_outlives_what_it_came_from(folder: pathlib.Path) -> None:
    before, llm = verify(folder), load_stage(folder, "llm")
    inodes = {path.name: path.stat().st_ino for path in folder.glob("llm-*.safetensors")}
    changed = {name: tensor.clone() for name, tensor in load_stage(folder, "encoder").items()}
    changed["image_newline"] += 1
    with CheckpointWriter(folder, FocusLlavaConfig.load(folder), max_shard_bytes=SHARD_BYTES) as writer:
        for name, tensor in changed.items():
            writer.add(name, tensor)
        writer.link("llm", folder)
        writer.finish(folder)
    assert verify(folder) != before
    assert {path.name: path.stat().st_ino for path in folder.glob("llm-*.safetensors")} == inodes and len(inodes) > 1
    assert torch.equal(load_stage(folder, "encoder")["image_newline"], changed["image_newline"])
    again = load_stage(folder, "llm")
    assert again.keys() == llm.keys() and all(torch.equal(again[name], llm[name]) for name in llm)


def test_views_and_bfloat16_are_stored_as_they_look(original: pathlib.Path, tmp_path: pathlib.Path) -> None:
    whole = torch.randn(64, 64).bfloat16()
    names = ["multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_2.weight"]
    views = dict(zip(names, (whole.T, whole[:, 3:9]), strict=True))
    save_checkpoint(tmp_path / "c", FocusLlavaConfig.load(original), views, {}, make_tokenizer())
    loaded = load_stage(tmp_path / "c", "encoder")
    for name, view in views.items():
        assert loaded[name].dtype == torch.bfloat16 and torch.equal(loaded[name], view)


def test_one_tensor_under_two_names_is_stored_twice(original: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shared = torch.randn(4, 4)
    names = ["multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_2.weight"]
    save_checkpoint(tmp_path / "c", FocusLlavaConfig.load(original), dict.fromkeys(names, shared), {}, make_tokenizer())
    loaded = load_stage(tmp_path / "c", "encoder")
    assert loaded.keys() == set(names) and all(torch.equal(tensor, shared) for tensor in loaded.values())


@pytest.mark.parametrize(("umask", "folder_mode", "file_mode"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)])
def test_files_have_the_modes_that_the_umask_says(
    umask: int, folder_mode: int, file_mode: int, tmp_path: pathlib.Path
) -> None:
    """Other users can read a checkpoint unless the umask forbids it; a shard that is more private is not linked."""
    make_random_checkpoint(tmp_path / "source")
    for path in (tmp_path / "source").glob("llm-*"):
        path.chmod(0o600)
    before = os.umask(umask)
    try:
        make_random_checkpoint(tmp_path / "written")
        with CheckpointWriter(tmp_path / "linked", FocusLlavaConfig.load(tmp_path / "source")) as writer:
            writer.link("llm", tmp_path / "source")
            for name, tensor in load_stage(tmp_path / "source", "encoder").items():
                writer.add(name, tensor)
            writer.finish(tmp_path / "source")
    finally:
        os.umask(before)
    for folder in (tmp_path / "written", tmp_path / "linked"):
        assert folder.stat().st_mode & 0o777 == folder_mode
        modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
        assert len(modes) > 8 and set(modes.values()) == {file_mode}, modes
    verify(tmp_path / "linked")
