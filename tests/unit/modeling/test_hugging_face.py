"""With the samplers off the model is Hugging Face's LLaVA-NeXT, from its folder and back to it."""

from __future__ import annotations

import io

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

from cluster.commands import export_checkpoint
from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.export_llava_next import export_llava_next
from services.checkpoint.import_llava_next import import_llava_next
from services.checkpoint.store import load_stage
from services.common.errors import InvalidInput
from services.modeling import FocusLlavaForConditionalGeneration, FocusLlavaProcessor
from tests.serving_client import picture
from tests.tiny_checkpoints import FAMILIES, make_hub_checkpoint
from tests.unit.modeling.conversations import checkpoint
from tests.unit.modeling.test_folder import SHIPPED

SMALL = {"layers": 3, "hidden": 32, "vision_layers": 2}
CONVERSATION = (("What number is on the red card?", (90, 40)), ("And here?", (30, 61)))


def hub_tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return found


def messages(as_image):
    """Two turns with an image each, and an answer between them."""
    turns = []
    for number, (text, size_wh) in enumerate(CONVERSATION):
        content = [{"type": "image", "image": as_image(picture(number, size_wh))}, {"type": "text", "text": text}]
        turns += [{"role": "user", "content": content}]
        turns += [{"role": "assistant", "content": [{"type": "text", "text": "The word is house."}]}]
    return turns[:-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_exports_are_read_by_hugging_face_and_answer_alike(tmp_path, family):
    hub = make_hub_checkpoint(tmp_path / "hub", family, **SMALL)
    import_llava_next(hub, tmp_path / "ours")
    arguments = [str(tmp_path / "ours"), str(tmp_path / "back"), "--format", "llava-next"]
    done = CliRunner().invoke(export_checkpoint, arguments)
    assert done.exit_code == 0, done.output
    assert "left out" in done.output and "vision_guided_sampler.selector.linear.weight" in done.output
    before, after = hub_tensors(hub), hub_tensors(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    hf, loading = LlavaNextForConditionalGeneration.from_pretrained(
        tmp_path / "back", dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(loading.values()), loading
    processor = AutoProcessor.from_pretrained(tmp_path / "back", use_fast=False)
    ours = FocusLlavaForConditionalGeneration.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    decoded = messages(lambda data: Image.open(io.BytesIO(data)))
    theirs = processor.apply_chat_template(
        decoded, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    inputs = FocusLlavaProcessor.from_pretrained(tmp_path / "ours")(messages(bytes))
    off = {"vision_sampler": False, "text_sampler": False}
    with torch.no_grad():
        logits_SV = ours(**inputs, **off).logits[0]
        expected_SV = hf(**theirs).logits[0]
        # An image's row is that of its last visual token.
        ids_S = theirs["input_ids"][0]
        last = torch.cat((ids_S[1:] != ids_S[:-1], torch.tensor([True]))) | (ids_S != ours.config.image_token_id)
        assert ids_S[last].tolist() == inputs["input_ids"][0].tolist()
        torch.testing.assert_close(logits_SV, expected_SV[last], rtol=1e-3, atol=1e-4 * expected_SV.abs().max().item())
        settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        answer = ours.generate(**inputs, **off, **settings)[0, -8:]
        assert answer.tolist() == hf.generate(**theirs, **settings)[0, -8:].tolist()


@pytest.mark.parametrize("tied", [False, True])
def test_an_export_comes_back_bit_for_bit(tmp_path, tied):
    ours, back = checkpoint(tmp_path / "ours", "qwen2", tied=tied, dtype="bfloat16"), tmp_path / "back"
    report = export_llava_next(ours, back, max_shard_bytes=30_000)
    tensors = hub_tensors(back)
    assert len(list(back.glob("model-*.safetensors"))) > 2 and len(tensors) == report.tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    _, loading = LlavaNextForConditionalGeneration.from_pretrained(back, output_loading_info=True)
    assert not any(loading.values()), loading
    import_llava_next(back, tmp_path / "again")
    for stage in ("encoder", "llm"):
        first, second = load_stage(ours, stage), load_stage(tmp_path / "again", stage)
        assert first.keys() == second.keys()
        # The samplers stayed behind: an import makes new ones.
        assert all(torch.equal(first[name], second[name]) for name in first if "vision_guided_sampler" not in name)
    before, after = FocusLlavaConfig.load(ours), FocusLlavaConfig.load(tmp_path / "again")
    assert before.text_config.to_diff_dict() == after.text_config.to_diff_dict()
    names = ("image_grid_pinpoints", "image_mean", "image_std", "image_token_id", "eos_token_ids", "dtype")
    assert all(getattr(before, name) == getattr(after, name) for name in names)


def test_what_llava_next_cannot_hold_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="vision_stem"):
        export_llava_next(SHIPPED, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    import_llava_next(make_hub_checkpoint(tmp_path / "hub", **SMALL), tmp_path / "ours")
    with pytest.raises(InvalidInput, match="not an empty folder"):
        export_llava_next(tmp_path / "ours", tmp_path / "full")
    assert not (tmp_path / "out").exists() and [path.name for path in (tmp_path / "full").iterdir()] == ["file"]
