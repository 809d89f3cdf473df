"""Streaming text: whole characters only, and no part of a stop string."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from services.common.types import SamplingParams
from services.text.detokenizer import MAX_HELD_TOKENS, Detokenizer
from tests.tiny_checkpoints import make_tokenizer

TEXTS = (
    "The number on the red card is seven.",
    "größer 中文 🙂🙃 e\u0301 👨\u200d👩\u200d👧 \u200bжук",
    " leading and trailing  \n\n",
)


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 2's: words with a leading "▁", every other character as <0x..> bytes."""
    vocab = {"<unk>": 0, "▁The": 1, "▁word": 2, "s": 3, "▁": 4, ".": 5, **{f"<0x{b:02X}>": 6 + b for b in range(256)}}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def stream(
    tokenizer: PreTrainedTokenizerFast, ids: list[int], stop: tuple[str, ...] = (), **sampling: Any
) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=stop, **sampling))
    pieces = []
    for token in ids:
        pieces.append(detokenizer.push(token))
        if detokenizer.stopped:
            return pieces, detokenizer
    return [*pieces, detokenizer.finish()], detokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_text_and_no_piece_holds_a_broken_character(text: str) -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer(text * 3, add_special_tokens=False)["input_ids"]
    pieces, _ = stream(tokenizer, ids)
    assert "".join(pieces) == text * 3
    assert not any("\ufffd" in piece for piece in pieces)
    if text.isascii():
        assert all(pieces[:-1]), "plain text is not held back"


def test_byte_fallback_characters_come_whole() -> None:
    tokenizer = byte_fallback_tokenizer()
    letters = [6 + b for b in "é中🙂".encode()]
    ids = [1, 2, 3, 4, *letters, 5, *letters, 2]
    pieces, _ = stream(tokenizer, ids)
    assert "".join(pieces) == "The words é中🙂.é中🙂 word"
    assert not any("\ufffd" in piece for piece in pieces)


def test_special_tokens_are_not_text() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("The word", add_special_tokens=False)["input_ids"]
    pieces, _ = stream(tokenizer, [*ids, tokenizer.eos_token_id])
    assert "".join(pieces) == "The word"


def test_an_unfinished_character_at_the_end_is_left_out() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("so 🙂", add_special_tokens=False)["input_ids"]
    pieces, _ = stream(tokenizer, ids[:-1])
    assert "".join(pieces) == "so "


def test_bytes_that_are_no_characters_do_not_hold_the_stream_back_for_ever() -> None:
    tokenizer = make_tokenizer()
    broken = tokenizer.convert_tokens_to_ids("ÿ")  # byte 0xFF, never part of UTF-8
    word = tokenizer(" word", add_special_tokens=False)["input_ids"]
    pieces, _ = stream(tokenizer, [broken] * 40 + word)
    assert "".join(pieces) == "\ufffd" * 40 + " word"
    assert "".join(pieces[:MAX_HELD_TOKENS]) != ""


def test_random_ids_stream_to_what_decoding_them_at_once_gives() -> None:
    tokenizer = make_tokenizer()
    random.seed(0)
    for _ in range(200):
        ids = [random.randrange(len(tokenizer)) for _ in range(60)]
        whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert "".join(stream(tokenizer, ids)[0]) == whole.rstrip("\ufffd")


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("The number on the red card is seven.", (" card",), "The number on the red"),
        ("The number on the red card is seven.", ("r on", "number"), "The "),
        ("The number on the red card", ("the red cards", "redder"), None),
        ("aaab", ("aab",), "a"),
        ("one\n\nHuman: two", ("\n\nHuman:", "###"), "one"),
        ("größer 🙂 so", ("🙂",), "größer "),
        ("The number", ("The",), ""),
    ],
)
def test_stop_strings(text: str, stop: tuple[str, ...], expected: str | None) -> None:
    tokenizer = make_tokenizer()
    for ids in (
        tokenizer(text, add_special_tokens=False)["input_ids"],
        [token for letter in text for token in tokenizer(letter, add_special_tokens=False)["input_ids"]],
    ):
        pieces, detokenizer = stream(tokenizer, ids, stop)
        assert detokenizer.stopped == (expected is not None)
        assert "".join(pieces) == (text if expected is None else expected)


def test_what_may_begin_a_stop_string_is_held_and_then_given() -> None:
    tokenizer = make_tokenizer()
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=("###",)))
    hash_id = tokenizer.convert_tokens_to_ids("#")
    letter = tokenizer.convert_tokens_to_ids("a")
    assert [detokenizer.push(t) for t in (letter, hash_id, hash_id, letter, hash_id)] == ["a", "", "", "##a", ""]
    assert detokenizer.finish() == "#"


def test_a_stop_string_is_part_of_the_text_where_asked_for() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("one two three", add_special_tokens=False)["input_ids"]
    pieces, detokenizer = stream(tokenizer, ids, ("wo t", "two t"), include_stop_str_in_output=True)
    assert detokenizer.stopped and "".join(pieces) == "one two t"


def test_a_stop_string_within_the_first_min_tokens_ends_nothing() -> None:
    tokenizer = make_tokenizer()
    ids = [tokenizer.convert_tokens_to_ids(letter) for letter in "abcabc"]
    for min_tokens, text in ((0, "a"), (1, "a"), (2, "abca"), (4, "abca"), (5, "abcabc")):
        pieces, detokenizer = stream(tokenizer, ids, ("b",), min_tokens=min_tokens)
        assert ("".join(pieces), detokenizer.stopped) == (text, min_tokens < 5)


def test_special_tokens_are_text_where_asked_for() -> None:
    tokenizer = make_tokenizer()
    ids = [tokenizer.convert_tokens_to_ids("a"), tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("b")]
    assert "".join(stream(tokenizer, ids)[0]) == "ab"
    assert "".join(stream(tokenizer, ids, keep_special_tokens=True)[0]) == f"a{tokenizer.eos_token}b"
