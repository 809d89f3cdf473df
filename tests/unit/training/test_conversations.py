"""Training branches are what the chat template makes of a conversation; LLaVA's JSON becomes batches."""

import json

import pytest
from PIL import Image
from transformers import AutoTokenizer

from services.checkpoint.config import FocusLlavaConfig
from services.common.errors import InvalidInput
from services.text.prompt import PromptRenderer
from tests.tiny_checkpoints import FAMILIES, make_random_checkpoint
from training.data.branches import BranchBuilder, Exchange
from training.data.conversations import ConversationBatches, read_exchanges


@pytest.fixture(scope="module", params=FAMILIES)
def builder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make_random_checkpoint(folder / "model", family=request.param)
    config = FocusLlavaConfig.load(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    built = BranchBuilder(PromptRenderer(tokenizer, image_token_id=config.image_token_id, context=4096))
    built.config = config
    return built


def test_a_branch_spells_the_conversation(builder):
    history = [Exchange(question="What is red?", answer="The card.")]
    prefix, branch = builder.build(Exchange(question="Which number?", answer="47"), history)
    tokenizer = builder.renderer.tokenizer
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is red?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "The card."}]},
        {"role": "user", "content": [{"type": "text", "text": "Which number?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "47"}]},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    spelled = tokenizer.decode([*prefix, builder.config.image_token_id, *branch.token_ids])
    bos = tokenizer.bos_token or ""
    assert whole.removeprefix(bos).startswith(spelled.removeprefix(bos)) and spelled.endswith(tokenizer.eos_token)
    labels = [label for label in branch.labels if label != -100]
    assert tokenizer.decode(labels).strip() == f"47{tokenizer.eos_token}"
    asked = [token for token, mine in zip(branch.token_ids, branch.instruction, strict=True) if mine]
    assert tokenizer.decode(asked).strip() == "Which number?"
    assert branch.labels[branch.answer_start] != -100 and branch.labels[branch.answer_start - 1] == -100


def test_json_conversations_become_batches(builder, tmp_path):
    entries = []
    for index in range(3):
        Image.new("RGB", (40 + index, 30), (index * 80, 0, 0)).save(tmp_path / f"{index}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"It is {index}."}] * (
            index + 1
        )
        entries.append({"image": f"{index}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(entries))
    batches = ConversationBatches(builder.config, builder, tmp_path / "data.json", seed=0, images=3)
    first = batches.batch(0, 0, 1)
    assert sorted(len(sample.branches) for sample in first) == [1, 2, 3]
    again = batches.batch(0, 0, 1)
    assert [s.branches for s in first] == [s.branches for s in again]
    orders = {tuple(len(s.branches) for s in batches.batch(step, 0, 1)) for step in range(12)}
    assert len(orders) > 1


ASKED = {"from": "human", "value": "?"}
SAID = {"from": "gpt", "value": "!"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("a.png", r"stage.data\[4\]: a.png has no `image`"),
        ({"conversations": [ASKED, SAID]}, r"stage.data\[4\]: .* has no `image`"),
        ({"image": ["a.png"], "conversations": [ASKED, SAID]}, r"stage.data\[4\]: .* has no `image`"),
        ({"image": "a.png", "conversations": [ASKED]}, r"stage.data\[4\].conversations: .* even number"),
        ({"image": "a.png", "conversations": [SAID, ASKED]}, r"stage.data\[4\].conversations\[0\]: .*human"),
        ({"image": "a.png", "conversations": [ASKED, {"from": "gpt"}]}, r"conversations\[1\]: .*gpt"),
        ({"image": "a.png", "conversations": [ASKED, {"from": "gpt", "value": 7}]}, r"conversations\[1\]: .*7"),
        ({"image": "a.png", "conversations": [{"from": "human", "value": "<image>"}, SAID]}, r"\[0\].value: '<image>'"),
    ],
)
def test_a_broken_entry_is_named(entry, message):
    with pytest.raises(InvalidInput, match=message):
        read_exchanges(entry, 4)


@pytest.mark.parametrize("text", ["{}", "[]", "nonsense"])
def test_a_file_that_is_no_list_is_named(builder, tmp_path, text):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(InvalidInput, match=r"stage.data: .*data.json"):
        ConversationBatches(builder.config, builder, tmp_path / "data.json", seed=0, images=1)


def test_what_the_context_cannot_hold_is_named(builder, tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "0.png")
    turns = [ASKED, SAID, ASKED, {"from": "gpt", "value": "word " * 5000}]
    (tmp_path / "data.json").write_text(json.dumps([{"image": "0.png", "conversations": turns}]))
    batches = ConversationBatches(builder.config, builder, tmp_path / "data.json", seed=0, images=1)
    with pytest.raises(InvalidInput, match=r"stage.data\[0\].conversations\[2\]: \d+ tokens .* context is 4096"):
        batches.sample(0)
    Image.new("RGB", (4000, 41)).save(tmp_path / "0.png")
    with pytest.raises(InvalidInput, match=r"stage.data\[0\].image: .*0.png is 4000 x 41 pixels, too narrow"):
        batches.sample(0)
    (tmp_path / "0.png").write_bytes(b"nothing")
    with pytest.raises(InvalidInput, match=r"stage.data\[0\].image"):
        batches.sample(0)
