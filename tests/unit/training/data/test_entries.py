"""Entries of published data are read, mended as LLaVA mends them, or refused by kind."""

import pytest

from services.common.types import ImagePart, TextPart
from training.data.entries import read_entry, signed_words
from training.data.faults import EntryFault


def human(value="Why?"):
    return {"from": "human", "value": value}


def gpt(value="So."):
    return {"from": "gpt", "value": value}


def spelt(raw):
    """Turns as (role, text with {image number})."""
    conversation = read_entry(raw)
    shown = []
    for turn in conversation.turns:
        parts = [f"{{{p.image}}}" if isinstance(p, ImagePart) else p.text for p in turn.parts]
        assert all(isinstance(part, ImagePart | TextPart) for part in turn.parts)
        shown.append((turn.role, "".join(parts)))
    return shown, conversation.images


@pytest.mark.parametrize(
    ("raw", "turns", "images"),
    [
        ({"image": "a.jpg", "conversations": [human("<image>\nWhat?"), gpt("X")]}, ["{0}What?", "X"], ("a.jpg",)),
        ({"image": "a.jpg", "conversations": [human("What?\n<image>"), gpt()]}, ["What?{0}", "So."], ("a.jpg",)),
        ({"image": "a.jpg", "conversations": [human("What?"), gpt()]}, ["{0}What?", "So."], ("a.jpg",)),
        ({"image": ["a", "b"], "conversations": [human(), gpt()]}, ["{0}{1}Why?", "So."], ("a", "b")),
        (
            {"images": ["a", "b"], "conversations": [human("Is <image> as"), gpt(), human("<image>?"), gpt()]},
            ["Is {0} as", "So.", "{1}?", "So."],
            ("a", "b"),
        ),
        ({"conversations": [gpt("Hi"), human(), gpt()]}, ["Why?", "So."], ()),
        ({"conversations": [human(), gpt(), human("And?")]}, ["Why?", "So."], ()),
        ({"image": "", "conversations": [human("What does <image> do in HTML?"), gpt()]},
         ["What does <image> do in HTML?", "So."], ()),
        ({"conversations": [{"from": "system", "value": "Be brief."}, human(), gpt()]},
         ["Be brief.", "Why?", "So."], ()),
        ({"image": ["a", "b"], "conversations": [human("<image>"), gpt(), human("<image>\nAnd?")]},
         ["{0}", "So."], ("a",)),
        ({"image": {"bytes": b"x", "path": None}, "conversations": '[{"from": "user", "value": "Q"}, '
          '{"from": "assistant", "value": "A"}]'}, ["{0}Q", "A"], (b"x",)),
        ({"image": "a.jpg", "conversations": [human(), gpt("It prints <image> here.")]},
         ["{0}Why?", "It prints <image> here."], ("a.jpg",)),
        (
            {"messages": [
                {"role": "user", "content": [
                    {"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "a <image> tag"}]},
                {"role": "assistant", "content": "Yes"},
            ]},
            ["{0}a <image> tag", "Yes"],
            ("a.png",),
        ),
    ],
)  # fmt: skip
def test_entries_are_read_and_mended(raw, turns, images):
    shown, found = spelt(raw)
    assert [text for _, text in shown] == turns and found == images
    assert [role for role, _ in shown if role != "system"] == ["user", "assistant"] * (len(turns) // 2)


@pytest.mark.parametrize(
    ("raw", "kind", "message"),
    [
        (["a"], "malformed", r"\['a'\] is not an object"),
        ({"image": "a.jpg"}, "malformed", "`conversations` is None"),
        ({"conversations": "no json"}, "malformed", "text that is not JSON"),
        ({"image": 7, "conversations": [human(), gpt()]}, "malformed", "7 is not the path"),
        ({"conversations": [human(), "x"]}, "malformed", "turn 1 is 'x'"),
        ({"conversations": [human(), {"from": "tool", "value": "x"}]}, "malformed", "turn 1 is from 'tool'"),
        ({"conversations": [human(), {"from": "gpt", "value": 3}]}, "malformed", "turn 1 says 3"),
        ({"conversations": [human(""), gpt()]}, "malformed", "turn 0, a question, has neither"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "malformed", "turn 0 has a part"),
        ({"conversations": [human()]}, "turn_order", "no question has an answer"),
        ({"conversations": [gpt()]}, "turn_order", "no question has an answer"),
        ({"conversations": [human(), human(), gpt()]}, "turn_order", "turn 1 is the user's again"),
        ({"conversations": [human(), gpt(), gpt()]}, "turn_order", "turn 2 is the assistant's again"),
        ({"image": "a", "conversations": [human("<image><image>"), gpt()]}, "image_marks", "2 marks <image> for 1"),
        ({"image": ["a", "b"], "conversations": [human("<image>"), gpt()]}, "image_marks", "1 marks <image> for 2"),
        ({"conversations": [human("<image>\nWhat?"), gpt()]}, "image_marks", "1 marks <image> and no image"),
        ({"image": "a", "conversations": [human(), gpt(" \n")]}, "empty_answer", "turn 1, an answer"),
    ],
)
def test_what_cannot_be_mended_is_named_by_kind(raw, kind, message):
    with pytest.raises(EntryFault, match=message) as caught:
        read_entry(raw)
    assert caught.value.kind == kind


def test_words_are_negative_without_an_image():
    turns = [human("one two"), gpt("three")]
    assert signed_words({"conversations": turns}) == -3
    assert signed_words({"image": "a", "conversations": turns}) == 3
    assert signed_words({"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w"}]}]})
    assert [signed_words(odd) for odd in (None, 3, {"conversations": "x"}, {"image": "a"})] == [-1, -1, -1, 1]
