"""Focus maps as `explain` draws them: importance against the engine and a naive loop, drawings, the JSON."""

from __future__ import annotations

import io
import json
import pathlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.focus_maps.drawing import BRANCH_COLOURS, importance_map, kept_map, scale_map, token_boxes
from evaluation.focus_maps.focus import FocusModel
from evaluation.focus_maps.page import page, shown_layers
from evaluation.focus_maps.report import explain, report
from services.checkpoint.config import VisionSamplerConfig
from services.common.errors import InvalidInput
from services.sampler.text_guided import keep_by_share
from tests import tiny_llm
from tests.llm_reference import naive_kept
from tests.tiny_checkpoints import make_random_checkpoint

SHIPPED = pathlib.Path(__file__).parents[3] / "checkpoints" / "focusllava-tiny"
SAMPLE = pathlib.Path(__file__).parents[3] / "docs" / "assets" / "sample.png"


def png(size_hw: tuple[int, int], seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size_hw, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def shipped() -> FocusModel:
    return FocusModel(SHIPPED)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def random_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("checkpoint") / request.param
    sampler = VisionSamplerConfig(base_grid=(4, 4), similarity="normalized", base_tile="sample")
    make_random_checkpoint(folder, request.param, vision_sampler=sampler)
    return folder, FocusModel(folder)


def test_importance_where_the_model_prunes_is_the_engines_own(shipped: FocusModel, random_model: Any) -> None:
    for model in (shipped, random_model[1]):
        pictures = [model.encode(png((90, 61))), model.encode(png((5, 9), seed=1)), model.encode(png((70, 200)))]
        for chosen, prune in (
            (pictures[:1], {}),
            (pictures, {"threshold": 0.4}),
            (pictures[1:], {"keep_ratio": 0.3}),
        ):
            focus = model.ask(chosen, "What number is on the red card?", **prune, max_tokens=3)
            maps, layer = focus.maps, model.pipeline.config.text_sampler.layer
            assert maps.prune_layer == layer
            assert focus.importance_KN.shape[0] == model.local.engine.decoder.num_layers - 1
            own_N = torch.tensor([value for one in maps.maps for value in one.importance])
            assert torch.equal(focus.importance_KN[layer - 1], own_N)
            assert 0 < focus.usage.visual_tokens_kept == sum(sum(one.kept) for one in maps.maps) < len(own_N)
            assert len(own_N) == focus.usage.visual_tokens_sampled
        unpruned = model.ask(chosen, "What number is on the red card?", text_sampler=False)
        assert not unpruned.maps.prune_layer and all(all(one.kept) for one in unpruned.maps.maps)
        assert torch.equal(unpruned.importance_KN, focus.importance_KN)
        model.local.engine.check_integrity()


def test_importance_of_every_layer_is_that_of_an_unpruned_pass_in_transformers(random_model: Any) -> None:
    folder, model = random_model
    picture = model.encode(png((61, 44)))
    focus = model.ask([picture], tiny_llm.QUESTIONS[0], max_tokens=1)
    lm = tiny_llm.reference_lm(folder)
    asked = replace(tiny_llm.request(model.local.engine), images=(picture.tokens,))
    prompt = model.local.engine.prepare(asked).prompt
    embeddings_SD = tiny_llm.reference_embeddings(lm, model.local.engine, asked)
    with torch.no_grad():
        hidden = lm(inputs_embeds=embeddings_SD[None], output_hidden_states=True).hidden_states
        rotary = lm.model.rotary_emb(embeddings_SD[None], torch.arange(len(embeddings_SD))[None])
        for layer in range(1, tiny_llm.LAYERS):
            kept = naive_kept(
                lm.model.layers[layer],
                hidden[layer][0],
                rotary,
                list(prompt.instruction_positions),
                prompt.visual_positions().tolist(),
                0.6,
            )
            assert keep_by_share(focus.importance_KN[layer - 1], 0.6).tolist() == kept
            assert 0 < len(kept) < focus.importance_KN.shape[1]


def test_two_questions_about_one_image_keep_different_places(shipped: FocusModel) -> None:
    picture = shipped.encode(SAMPLE.read_bytes())
    where = picture.map
    index, boxes_n4 = token_boxes(where, "map")
    boxes_n4 = boxes_n4 / np.array([where.width, where.height] * 2)
    centre_n2 = (boxes_n4[:, :2] + boxes_n4[:, 2:]) / 2
    # Centres of the red card and of the yellow one, as fractions (docs/assets/sample.png).
    on = [index[(np.abs(centre_n2 - centre) < 0.1).all(1)] for centre in ((0.36, 0.57), (0.91, 0.43))]
    for asked, (question, answer) in enumerate(
        (("What number is on the red card?", "60"), ("What word is on the yellow card?", "hen"))
    ):
        focus = shipped.ask([picture], question)
        importance_N = focus.importance_KN[1]
        assert focus.answer == answer
        # Words before the colour cannot know which card is meant, so a part of the mean lies elsewhere.
        own, other = (float(importance_N[card].sum()) for card in (on[asked], on[1 - asked]))
        assert own > 0.3 and own > 5 * other
        assert any(focus.maps.maps[0].kept[token] for token in on[asked])


def test_drawings_show_what_was_chosen(shipped: FocusModel) -> None:
    picture = shipped.encode(SAMPLE.read_bytes())
    (where,) = shipped.ask([picture], "What number is on the red card?").maps.maps
    size = picture.picture.size
    kept = np.asarray(kept_map(picture.picture, where, box_wh=size)).astype(int)
    heat = np.asarray(importance_map(picture.picture, where, box_wh=size)).astype(int)
    scales = np.asarray(scale_map(picture.picture, where, size)).astype(int)
    original = np.asarray(picture.picture).astype(int)
    tokens, boxes_n4 = token_boxes(where, "map")
    for token, (x0, y0, x1, y1) in zip(tokens, boxes_n4.round().astype(int).tolist(), strict=True):
        inside = slice(y0 + 2, y1 - 2), slice(x0 + 2, x1 - 2)
        assert np.array_equal(kept[inside], original[inside]) == where.kept[token]
    assert where.regions is not None
    for region, (x0, y0, x1, y1) in enumerate(np.array(where.regions.boxes).round().astype(int).tolist()):
        # A quarter of a token off the corner: no line of any branch passes there.
        y, x = y0 + (y1 - y0) // 16, x0 + (x1 - x0) // 16
        tint = np.array(BRANCH_COLOURS[where.regions.branch_ids[region]])
        assert np.abs(scales[y, x] - (original[y, x] + tint) / 2).max() <= 1
    best = np.array(where.importance)[tokens].argmax()
    x0, y0, x1, y1 = boxes_n4[best].round().astype(int).tolist()
    rest = np.ones(heat.shape[:2], dtype=bool)
    rest[y0:y1, x0:x1] = False
    assert heat[y0:y1, x0:x1].sum(-1).mean() > heat[rest].sum(-1).mean() + 150


def test_a_page_for_several_images_and_with_both_samplers_off(random_model: Any) -> None:
    _, model = random_model
    sizes = ((90, 61), (5, 9), (3, 200))
    pictures = [model.encode(png(size, seed)) for seed, size in enumerate(sizes)]
    focus = model.ask(pictures, "How many? " * 30, max_tokens=2)
    assert page(focus).width == 1600
    assert shown_layers(focus) == [1, 2, 3, 4, 5] and shown_layers(focus, most=2) in ([1, 5], [2, 5])
    assert 2 in shown_layers(focus, most=2)
    plain = model.ask([model.encode(png((90, 61)), vision_sampler=False)], "How?", text_sampler=False)
    assert page(plain).width == 1600
    made = report(focus, ["a", "b", "c"])
    assert json.loads(json.dumps(made)) == made and made["visual_tokens"]["kept"] == focus.usage.visual_tokens_kept
    assert made["layers"] == [1, 2, 3, 4, 5] and made["pruning"]["layer"] == 2
    kept, count = [], 0
    for image, size in zip(made["images"], sizes, strict=True):
        assert image["size_wh"] == [size[1], size[0]] and image["first_token"] == count
        assert {len(row) for row in image["importance"]} == {len(image["boxes"])}
        assert image["boxes"].count(None) >= (len(image["regions"]["y"]) - 1 if image["regions"] else 0)
        kept += [image["first_token"] + index for index in image["kept"]]
        count += len(image["boxes"])
    assert len(kept) == focus.usage.visual_tokens_kept and count == made["visual_tokens"]["sampled"]
    assert report(plain, ["a"])["pruning"] is None


def test_what_cannot_be_explained_is_refused(shipped: FocusModel, tmp_path: pathlib.Path) -> None:
    with pytest.raises(InvalidInput, match="images"):
        shipped.ask([], "What?")
    with pytest.raises(InvalidInput, match="no words"):
        shipped.ask([shipped.encode(png((9, 9)))], " ")
    for output in (tmp_path / "focus.jpg", tmp_path / "missing" / "focus.png"):
        with pytest.raises(InvalidInput, match="output"):
            explain(SHIPPED, [("a", png((9, 9)))], "What?", output)
