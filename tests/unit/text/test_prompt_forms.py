"""Prompts of other forms: an answer that goes on, several system turns, raw prompts."""

from __future__ import annotations

import pytest

from services.common.errors import InvalidInput
from tests.prompt_rendering import VICUNA, renderer, turn, words
from tests.tiny_checkpoints import FAMILIES, make_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_goes_on_from_the_assistants_last_words(family: str) -> None:
    target, asked = renderer(family, instruction="to_answer"), [turn("user", 0, "What number?")]
    begun = target.render([*asked, turn("assistant", "It is sev")], [5], continue_final=True)
    text = target.tokenizer.decode(begun.input_ids)
    assert text.endswith("It is sev")
    whole = target.render([*asked, turn("assistant", "It is sev")], [5])
    assert target.tokenizer.decode(whole.input_ids).startswith(text) and len(whole.input_ids) > len(begun.input_ids)
    # What begins the answer chooses no visual token.
    first = target.render(asked, [5])
    assert begun.input_ids[: len(first.input_ids)] == first.input_ids or family == "mistral"  # it has a space more
    assert max(begun.instruction_positions) <= len(first.input_ids)
    assert words(target, begun).startswith("What number?") and "sev" not in words(target, begun)
    for last in (turn("user", "x"), turn("system", "x")):
        with pytest.raises(InvalidInput, match="continue_final_message: expects the last turn"):
            target.render([*asked, last], [5], continue_final=True)


def test_an_answer_that_goes_on_is_tokenised_as_transformers_does() -> None:
    tokenizer = make_tokenizer("qwen2")
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "The word"}]
    expected = tokenizer.apply_chat_template(messages, continue_final_message=True, return_dict=True)["input_ids"]
    begun = renderer("qwen2").render([turn("user", "What?"), turn("assistant", "The word")], [], continue_final=True)
    assert list(begun.input_ids) == list(expected)


SYSTEMS = (turn("system", "A."), turn("system", "B."), turn("user", "What?"), turn("system", "C."), turn("user", "So?"))


ONE_SYSTEM = VICUNA.replace(
    "{% for m in messages %}",
    "{% if messages[1:] | selectattr('role', 'equalto', 'system') | list %}{{ raise_exception('late') }}{% endif %}"
    "{% for m in messages %}",
)


FIRST_ONLY = VICUNA.replace("{% for m in messages %}", "{% for m in messages if loop.first or m.role != 'system' %}")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (None, "system\n\nA.\n\nB.useruser"),
        (VICUNA, "A.\n\nB. USER: What? C. USER: So? ASSISTANT:"),
        (ONE_SYSTEM, "A.\n\nB.\n\nC. USER: What? USER: So? ASSISTANT:"),
        (FIRST_ONLY.replace("loop.first", "m == messages[0]"), "A.\n\nB.\n\nC. USER: What? USER: So? ASSISTANT:"),
    ],
)
def test_system_turns_stay_where_the_template_knows_them_and_are_joined_elsewhere(
    template: str | None, text: str
) -> None:
    target = renderer(template=template)
    prompt = target.render(SYSTEMS, [])
    shown = target.tokenizer.decode(prompt.input_ids, skip_special_tokens=True)
    assert shown.endswith(text) if template else "A.\n\nB." in shown and "What?system\n\nC." in shown
    assert words(target, prompt).strip() == "So?"


def test_a_raw_prompt_is_taken_as_it_is() -> None:
    for family in FAMILIES:
        target = renderer(family)
        tokenizer, eos = target.tokenizer, target.tokenizer.eos_token
        prompt = target.render_raw(f"What?{eos} <image>")
        bos = [tokenizer.bos_token_id] if tokenizer.bos_token else []
        plain = tokenizer.encode(f"What?{eos} <\u200bimage>", add_special_tokens=False)
        assert list(prompt.input_ids) == [*bos, *plain] and tokenizer.eos_token_id in prompt.input_ids
        assert target.image_token_id not in prompt.input_ids and prompt.instruction_positions == ()
        assert target.render_raw(prompt.input_ids) == prompt
        if bos:  # a prompt that brings its own gets no second one
            assert target.render_raw(f"{tokenizer.bos_token}What?").input_ids.count(bos[0]) == 1


def test_raw_prompts_that_are_refused() -> None:
    target = renderer("qwen2", context=16)
    image = target.image_token_id
    for prompt, message in (
        ("", "^raw_prompt: makes a prompt of no tokens"),
        ((5, image), r"^raw_prompt\.token_ids\[1\]: is the image placeholder"),
        ((5,) * 16, "^raw_prompt: make a prompt of 16 tokens .*context of 16"),
    ):
        with pytest.raises(InvalidInput, match=message):
            target.render_raw(prompt)
    assert len(target.render_raw((5,) * 15).input_ids) == 15
