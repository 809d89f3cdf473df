"""Single tokens as text, for both kinds of tokenizer that LLaVA-NeXT's decoders bring."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from services.common.types import FinishedEvent, TokenEvent, TokenLogprob, TokenLogprobs, Usage
from services.grammar.grammars import Grammars
from services.text.token_texts import TokenTexts
from tests import tiny_llm


def unknown(token_id: int) -> bytes:
    raise AssertionError(f"token {token_id} is no part of a character")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_byte_level_tokens_keep_their_space_and_join_to_the_text(family: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm.checkpoint(family))
    texts = TokenTexts(tokenizer, unknown)
    ids = tokenizer.encode("which card says seven?", add_special_tokens=False)
    assert "".join(map(texts.text, ids)) == "which card says seven?"
    (part,) = {texts.text(token) for token in tokenizer.encode("\u4f60", add_special_tokens=False)[-3:]}
    assert part == "\ufffd"
    assert texts.text(tokenizer.eos_token_id) == tokenizer.eos_token


def test_sentencepiece_tokens_keep_their_space() -> None:
    vocabulary = {
        token: number for number, token in enumerate(["<unk>", "</s>", "\u2581a", "\u2581card", "s", "<0x0A>"])
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    assert fast.decode([3]) == "card"  # what this is about
    texts = TokenTexts(fast, unknown)
    assert [texts.text(token) for token in (3, 4, 5, 1)] == [" card", "s", "\n", "</s>"]


def test_events_are_filled_in() -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm.checkpoint())
    grammars = Grammars(tokenizer, vocabulary=len(tokenizer), eos_token_ids=[tokenizer.eos_token_id])
    texts = TokenTexts(tokenizer, grammars.token_bytes)
    card, eos = tokenizer.encode(" card", add_special_tokens=False)[-1], tokenizer.eos_token_id
    chosen, other = TokenLogprob(token_id=card, logprob=-0.5), TokenLogprob(token_id=eos, logprob=-1.0)
    event = TokenEvent(text="", token_ids=(card,), logprobs=(TokenLogprobs(chosen=chosen, top=(chosen, other)),))
    filled = texts.filled_in(event)
    assert filled.logprobs[0].chosen == TokenLogprob(token_id=card, logprob=-0.5, text=" card", raw_bytes=b" card")
    assert [token.text for token in filled.logprobs[0].top] == [" card", tokenizer.eos_token]
    assert filled.logprobs[0].top[1].raw_bytes == tokenizer.eos_token.encode()
    # A character in three tokens: each brings its own byte, and together they are the character.
    parts = tokenizer.encode("\u4f60", add_special_tokens=False)[-3:]
    logprobs = tuple(TokenLogprobs(chosen=TokenLogprob(token_id=part, logprob=-1.0)) for part in parts)
    filled = texts.filled_in(TokenEvent(text="", token_ids=tuple(parts), logprobs=logprobs))
    assert b"".join(entry.chosen.raw_bytes for entry in filled.logprobs) == "\u4f60".encode()
    assert {entry.chosen.text for entry in filled.logprobs} == {"\ufffd"}
    for plain in (TokenEvent(text="x", token_ids=(3,)), FinishedEvent(reason="stop", usage=Usage())):
        assert texts.filled_in(plain) is plain
