"""A checkpoint of a plain language model and a plain CLIP: every weight arrives, an image can be asked about."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, CLIPConfig, CLIPModel, CLIPVisionModel
from transformers.models.auto import CONFIG_MAPPING

from services.checkpoint.assemble import IMAGE_TOKEN, assemble
from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.store import load_stage, verify
from services.common.errors import InvalidInput
from services.local.model import LocalModel
from tests.tiny_checkpoints import EOS, make_tokenizer, text_fields, vision_fields

PLAIN = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + "
    "'<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""A text model's template, as Llama-3's: a turn's content is a string."""


@pytest.fixture
def text(tmp_path: pathlib.Path) -> pathlib.Path:
    """A hub folder of a Llama whose tokenizer knows no image, and whose vocabulary is full."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer("llama")
    tokenizer.backend_tokenizer.normalizer = None
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] != IMAGE_TOKEN]
    fields = text_fields("llama", hidden=32, layers=2, heads=4, kv_heads=2, context=2048)
    fields["vocab_size"] = 400
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**fields))
    folder = tmp_path / "text"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    saved = json.loads((folder / "tokenizer_config.json").read_text())
    saved.pop("extra_special_tokens", None)
    saved.pop("image_token", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(saved))
    text_of = json.loads((folder / "tokenizer.json").read_text().replace(IMAGE_TOKEN, "<spare>"))
    (folder / "tokenizer.json").write_text(json.dumps(text_of))
    (folder / "chat_template.jinja").write_text(PLAIN)
    return folder


@pytest.fixture(params=["whole", "vision alone"])
def vision(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    """A hub folder of a CLIP, whole or its vision model alone."""
    torch.manual_seed(1)
    fields = vision_fields(width=32, layers=3, tile_px=28, patch_px=7)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(vision_config=fields, text_config=small, projection_dim=32))
    folder = tmp_path / "vision"
    if request.param == "whole":
        clip.save_pretrained(folder)
    else:
        alone = CLIPVisionModel(clip.config.vision_config)
        alone.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]})
    )
    return folder


def test_weights_arrive_and_an_image_can_be_asked_about(
    text: pathlib.Path, vision: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    report = assemble(text, vision, tmp_path / "ours")
    assert report.fingerprint == verify(tmp_path / "ours") == assemble(text, vision, tmp_path / "again").fingerprint
    config = FocusLlavaConfig.load(tmp_path / "ours")
    assert config.image_token_id == 400 and config.text_config.vocab_size == 448
    assert config.image_mean == (0.5, 0.4, 0.3) and not config.vision_sampler.enabled
    assert config.image_grid_pinpoints[0] == (28, 56)
    ours = load_stage(tmp_path / "ours", "llm")
    theirs = AutoModelForCausalLM.from_pretrained(text).state_dict()
    assert {name.removeprefix("language_model.") for name in ours} == set(theirs)
    for name, tensor in theirs.items():
        found = ours["language_model." + name]
        assert torch.equal(found[: len(tensor)], tensor), name
    embedded = ours["language_model.model.embed_tokens.weight"]
    assert torch.allclose(embedded[447], theirs["model.embed_tokens.weight"].mean(0), atol=1e-6)
    with LocalModel(tmp_path / "ours", "cpu", "float32") as model:
        picture = tmp_path / "picture.png"
        Image.new("RGB", (56, 56), "red").save(picture)
        answer = model.ask(picture, "What is this?", max_tokens=4, ignore_eos=True)
        assert answer.usage.completion_tokens == 4 and answer.usage.visual_tokens_uncompressed == 16 + 8 * 9
        turns = model.engine.renderer.tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}], tokenize=False
        )
    assert turns == "<|start_header_id|>user<|end_header_id|>\n\n<image>\nHi<|eot_id|>"


def test_what_cannot_be_read_is_named(text: pathlib.Path, vision: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(InvalidInput, match="model_type"):
        assemble(text, text, tmp_path / "ours")
    (vision / "preprocessor_config.json").write_text("{}")
    with pytest.raises(InvalidInput, match="image_mean"):
        assemble(text, vision, tmp_path / "ours")
    with pytest.raises(InvalidInput, match="chat_template"):
        assemble(text, vision, tmp_path / "ours", template="{{ messages[0]['words'] }}")
    (text / "chat_template.jinja").unlink()
    with pytest.raises(InvalidInput, match="template"):
        assemble(text, vision, tmp_path / "ours")
    assert not (tmp_path / "ours").exists() and EOS["llama"] in (text / "tokenizer.json").read_text()
