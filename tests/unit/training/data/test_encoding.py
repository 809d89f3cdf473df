"""A conversation's sequence is what is served, turn by turn; labels are the answers; too much is cut off the end."""

import io

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from services.checkpoint.config import FocusLlavaConfig
from services.common.errors import InvalidInput
from services.encoder.pipeline import EncoderPipeline
from services.modeling.loss import IGNORED
from services.text.prompt import PromptRenderer
from tests.tiny_checkpoints import FAMILIES, make_random_checkpoint
from training.data.encoding import ConversationEncoder, visual_tokens
from training.data.entries import read_entry
from training.data.faults import EntryFault

# The template of llava-v1.6-vicuna: answers end with a space and no token.
VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TWO_IMAGES = {
    "image": ["a", "b"],
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "<image>\nWhat is red?"},
        {"from": "gpt", "value": "The card\u00e9."},
        {"from": "human", "value": "Is </s> or <image>\n larger? Spell <|eot_id|>."},
        {"from": "gpt", "value": "47"},
    ],
}


def picture(width=60, height=40, kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 60)).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {family: tmp_path_factory.mktemp(family) / "model" for family in FAMILIES}
    for family, folder in made.items():
        make_random_checkpoint(folder, family=family)
    return made


def encoder_of(folder, template="", **settings):
    config = FocusLlavaConfig.load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template or tokenizer.chat_template
    renderer = PromptRenderer(tokenizer, image_token_id=config.image_token_id, context=2048, instruction="all_turns")
    return ConversationEncoder(config, renderer, **settings)


def encode(encoder, raw, *pictures):
    return encoder.encode(read_entry(raw), [encoder.tiles(data) for data in pictures])


@pytest.fixture(params=[*FAMILIES, "vicuna"])
def encoder(request, folders):
    return encoder_of(folders["mistral"], VICUNA) if request.param == "vicuna" else encoder_of(folders[request.param])


def test_what_stands_before_each_answer_is_the_served_prompt(encoder):
    conversation = read_entry(TWO_IMAGES)
    sequence = encode(encoder, TWO_IMAGES, picture(), picture(40, 60)).sequence
    labelled = (sequence.labels != IGNORED).tolist()
    begins = [n for n, (mine, before) in enumerate(zip(labelled, [False, *labelled], strict=False)) if mine > before]
    asked = set()
    for begin, turns, images in zip(begins, (2, 4), (1, 2), strict=True):
        prompt = encoder.renderer.render(conversation.turns[:turns], [1] * images)
        assert tuple(sequence.input_ids[:begin].tolist()) == prompt.input_ids
        asked |= set(prompt.instruction_positions)
    assert sequence.instruction.nonzero().flatten().tolist() == sorted(asked)
    tokenizer = encoder.renderer.tokenizer
    answers = tokenizer.decode(sequence.labels[sequence.labels != IGNORED])
    assert answers.replace(" ", "") == f"Thecard\u00e9.{tokenizer.eos_token}47{tokenizer.eos_token}"
    assert (sequence.labels[sequence.input_ids == encoder.config.image_token_id] == IGNORED).all()
    assert len(sequence.images) == 2 and sequence.images[0].image_size_hw == (40, 60)


def test_where_a_template_ends_answers_with_nothing_the_end_token_is_learnt_and_not_read(folders):
    encoder = encoder_of(folders["mistral"], VICUNA)
    raw = {**TWO_IMAGES, "conversations": TWO_IMAGES["conversations"][1:]}
    whole = encode(encoder, raw, *[picture()] * 2)
    sequence, tokenizer = whole.sequence, encoder.renderer.tokenizer
    assert tokenizer.decode(sequence.labels[sequence.labels != IGNORED]) == " The card\u00e9.</s> 47</s>"
    assert "ASSISTANT: The card\u00e9. USER:" in tokenizer.decode(sequence.input_ids)
    assert tokenizer.decode(sequence.input_ids).endswith("ASSISTANT: 47</s>")
    # Cut there, the first answer's end is the last that is learnt.
    first = encode(encoder_of(folders["mistral"], VICUNA, max_length=whole.tokens - 30), raw, *[picture()] * 2).sequence
    assert first.labels[-1] == tokenizer.eos_token_id != first.input_ids[-1]
    assert not torch.equal(first.labels[-2:], first.input_ids[-2:]) and first.labels[-2] == first.input_ids[-2]


def test_a_prompt_that_ends_with_a_space_keeps_its_own_tokens(folders):
    template = VICUNA.replace("'ASSISTANT:'", "'ASSISTANT: '")
    encoder = encoder_of(folders["llama"], template)
    conversation = read_entry({**TWO_IMAGES, "conversations": TWO_IMAGES["conversations"][1:]})
    sequence = encoder.encode(conversation, [encoder.tiles(picture())] * 2).sequence
    prompt = encoder.renderer.render(conversation.turns[:1], [1])
    begins = int((sequence.labels != IGNORED).nonzero()[0])
    assert tuple(sequence.input_ids[:begins].tolist()) == prompt.input_ids
    # In one text the space would be the first letter of the answer's first token.
    assert prompt.input_ids[-1] == encoder.renderer.tokenizer(" ", add_special_tokens=False)["input_ids"][0]


def test_plain_captions_are_the_image_and_the_answer(folders):
    encoder = encoder_of(folders["llama"])
    plain = ConversationEncoder(encoder.config, encoder.renderer, template="plain")
    raw = {
        "image": "a",
        "conversations": [{"from": "human", "value": "Say it.\n<image>"}, {"from": "gpt", "value": "A <image>"}],
    }
    sequence = encode(plain, raw, picture()).sequence
    tokenizer = plain.renderer.tokenizer
    assert tokenizer.decode(sequence.input_ids) == "<|begin_of_text|><image>A <\u200bimage>\n"
    assert (sequence.labels != IGNORED).tolist() == [False, False] + [True] * (len(sequence.labels) - 2)
    assert not sequence.instruction.any()


def test_too_long_an_answer_is_cut_and_images_never(folders):
    whole = encode(encoder_of(folders["llama"]), TWO_IMAGES, picture(), picture(40, 60))
    count = encoder_of(folders["llama"]).config
    visual = sum(visual_tokens(tiles, count.patches_per_side) for tiles in whole.sequence.images)
    assert whole.tokens == len(whole.sequence.input_ids) - 2 + visual and whole.cut == 0
    one_less = encode(encoder_of(folders["llama"], max_length=whole.tokens - 1), TWO_IMAGES, picture(), picture(40, 60))
    assert torch.equal(one_less.sequence.input_ids, whole.sequence.input_ids[:-1]) and one_less.cut == 1
    # Where the second image would not be whole, its question goes with it.
    answered = encode(
        encoder_of(folders["llama"], max_length=whole.tokens - 20), TWO_IMAGES, picture(), picture(40, 60)
    )
    assert len(answered.sequence.images) == 1 and answered.sequence.labels[-1] != IGNORED
    assert answered.tokens + answered.cut == whole.tokens
    assert torch.equal(answered.sequence.input_ids, whole.sequence.input_ids[: len(answered.sequence.input_ids)])
    with pytest.raises(EntryFault, match="of which the first 60 hold no answer") as caught:
        encode(encoder_of(folders["llama"], max_length=60), TWO_IMAGES, picture(), picture(40, 60))
    assert caught.value.kind == "too_long"


def test_visual_tokens_are_counted_as_the_encoder_makes_them(folders):
    pipeline = EncoderPipeline.from_checkpoint(folders["llama"])
    encoder = encoder_of(folders["llama"])
    for size in ((60, 40), (40, 60), (300, 31), (28, 28), (1000, 999)):
        prepared = pipeline.prepare(picture(*size))
        made = pipeline.encode([prepared], [False])[0].uncompressed_tokens
        assert visual_tokens(encoder.tiles(picture(*size)), encoder.config.patches_per_side) == made


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"nothing", "corrupt_image"),
        (picture(kind="JPEG")[:-200], "corrupt_image"),
        (picture(4000, 41), "image_size"),
        (picture(3000, 20), "image_size"),
        (picture(17000, 400), "image_size"),
    ],
)
def test_images_that_serving_would_not_see_are_faults(folders, data, kind):
    with pytest.raises(EntryFault) as caught:
        encoder_of(folders["llama"]).tiles(data)
    assert caught.value.kind == kind


def test_an_answer_that_does_not_follow_its_prompt_is_refused(folders):
    with pytest.raises(InvalidInput, match="chat_template"):
        encoder_of(folders["llama"], VICUNA.replace("'ASSISTANT:'", "'SAY:'"))
