"""`generate` answers what the served stages answer, and its cache shrinks at the prune layer."""

from __future__ import annotations

import pathlib

import pytest
import torch

from focusllava import assistant, user
from services.common.errors import InvalidInput
from services.local.model import LocalModel
from services.modeling import FocusLlavaForConditionalGeneration, FocusLlavaProcessor
from services.modeling.cache import ShrinkingCache
from services.modeling.packing import TrainedSequence
from services.modeling.pruning import PruneDraw
from tests.serving_client import picture
from tests.unit.modeling.conversations import checkpoint, load

ROOT = pathlib.Path(__file__).parents[3]
SHIPPED = ROOT / "checkpoints" / "focusllava-tiny"
SAMPLE = ROOT / "docs" / "assets" / "sample.png"
QUESTIONS = ("What number is on the red card?", "What word is on the yellow card?", "How many cards are there?")


def asks(text, *images):
    shown = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def shipped():
    model = FocusLlavaForConditionalGeneration.from_pretrained(SHIPPED, dtype=torch.float32)
    return model, FocusLlavaProcessor.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def served():
    with LocalModel(SHIPPED, dtype="float32") as model:
        yield model


def answers(model, inputs, **settings):
    """New tokens of each sequence, up to the end of its answer."""
    rows = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()
    end = model.generation_config.eos_token_id[0]
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


@pytest.mark.parametrize("vision", [True, False])
@pytest.mark.parametrize("text", [True, False])
def test_greedy_answers_are_those_of_the_served_stages(shipped, served, vision, text):
    model, processor = shipped
    samplers = {"vision_sampler": vision, "text_sampler": text}
    expected = [list(served.ask(str(SAMPLE), q, max_tokens=12, **samplers).token_ids) for q in QUESTIONS]
    conversations = [asks(question, SAMPLE) for question in QUESTIONS]
    alone = [answers(model, processor(one), max_new_tokens=12, **samplers)[0] for one in conversations]
    assert alone == expected and len({tuple(row) for row in expected}) == 3
    # Padded on the left, in one batch.
    assert answers(model, processor(conversations), max_new_tokens=12, **samplers) == expected


def test_several_images_and_turns_and_a_threshold_are_those_of_the_served_stages(shipped, served):
    model, processor = shipped
    first, second = picture(1, (120, 90)), picture(2, (60, 200))
    turns = [user("What is on the card?", images=[first]), assistant("A hen"), user("And there?", images=[second])]
    expected = served.chat(turns, max_tokens=10, threshold=0.7)
    said = {"role": "assistant", "content": "A hen"}
    messages = [*asks("What is on the card?", first), said, *asks("And there?", second)]
    assert answers(model, processor(messages), max_new_tokens=10, threshold=0.7) == [list(expected.token_ids)]


def test_kept_tokens_are_those_of_the_served_engine(shipped, served):
    """A training pass with the checkpoint's layer prunes a single-turn conversation as the engine does."""
    model, processor = shipped
    for question in QUESTIONS:
        answer = served.ask(str(SAMPLE), question, max_tokens=1, threshold=0.9)
        (kept_K,) = answer.kept
        inputs = processor(asks(question, SAMPLE))
        each = TrainedSequence(
            input_ids=inputs["input_ids"][0],
            labels=torch.full_like(inputs["input_ids"][0], -100),
            instruction=inputs["instruction_mask"][0],
            images=(processor.tiles(SAMPLE),),
        )
        cut = PruneDraw(layer=3, thresholds=(0.9,))
        with torch.no_grad():
            done = model.run([each], vision_sampler=True, cut=cut)
        first = int((each.input_ids == model.config.image_token_id).nonzero())
        assert (done.packed.position_S[done.packed.visual_S] - first).tolist() == kept_K.tolist()
        assert 0 < len(kept_K) < done.visual == answer.usage.visual_tokens_sampled


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    folder = checkpoint(tmp_path_factory.mktemp("random") / "llama")
    return load(folder), FocusLlavaProcessor.from_pretrained(folder)


IMAGES = [picture(seed, size) for seed, size in enumerate(((56, 40), (80, 30), (90, 90)))]
MIXED = [
    asks("What number is on the red card?", IMAGES[0]),
    asks("Describe the house."),
    asks("Which word?", IMAGES[1], IMAGES[2]),
]


def test_the_cache_shrinks_and_changes_no_logits(random):
    """Steps with it against passes over all tokens; a batch, padded, against its sequences alone."""
    model, processor = random
    inputs = processor(MIXED)
    with torch.no_grad():
        made = model.generate(
            **inputs,
            max_new_tokens=5,
            min_new_tokens=5,
            threshold=0.5,
            return_dict_in_generate=True,
            output_logits=True,
        )
        cache = made.past_key_values
        lengths = [layer.keys.shape[2] for layer in cache.layers]
        assert isinstance(cache, ShrinkingCache) and cache.prune_layer == 1
        assert lengths[0] > lengths[1] == lengths[3] and lengths[1] < 0.9 * lengths[0]
        new = made.sequences[:, inputs["input_ids"].shape[1] :]
        for row, conversation in enumerate(MIXED):
            alone = processor(conversation)
            ids = torch.cat((alone["input_ids"], new[row : row + 1, :-1]), dim=1)
            mask = torch.nn.functional.pad(alone["instruction_mask"], (0, 4))
            rest = {name: alone[name] for name in ("pixel_values", "image_sizes") if name in alone}
            expected = model(ids, instruction_mask=mask, threshold=0.5, **rest).logits[0, -5:]
            torch.testing.assert_close(torch.stack([step[row] for step in made.logits]), expected, rtol=1e-3, atol=1e-4)


def test_no_cache_padding_on_the_right_and_beams(random):
    model, processor = random
    inputs = processor(MIXED)
    expected = model.generate(**inputs, max_new_tokens=4, threshold=0.5)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, threshold=0.5, use_cache=False), expected)
    right = processor(MIXED, padding_side="right")
    with torch.no_grad():
        left, other = (model(**each, threshold=0.5).logits for each in (inputs, right))
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(left[real], other[right["attention_mask"].bool()], rtol=1e-4, atol=1e-5)
    beams = model.generate(**inputs, max_new_tokens=4, threshold=0.5, num_beams=3, num_return_sequences=3)
    by_one = [model.generate(**processor(one), max_new_tokens=4, threshold=0.5, num_beams=3) for one in MIXED]
    width = inputs["input_ids"].shape[1]
    assert [row[-4:] for row in beams[::3, width:].tolist()] == [one[0, -4:].tolist() for one in by_one]


def test_only_its_own_cache_is_taken(random):
    model, processor = random
    with pytest.raises(InvalidInput, match="past_key_values"):
        model(processor(MIXED[1])["input_ids"], past_key_values=object())
