"""Training branches are what the chat template makes of a question and its answer."""

import pytest
from transformers import AutoTokenizer

from services.checkpoint.config import FocusLlavaConfig
from services.text.prompt import PromptRenderer
from tests.tiny_checkpoints import FAMILIES, make_random_checkpoint
from training.data.branches import BranchBuilder, Exchange


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
    prefix, branch = builder.build(Exchange(question="Which number?", answer="47"))
    tokenizer = builder.renderer.tokenizer
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which number?"}]},
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
