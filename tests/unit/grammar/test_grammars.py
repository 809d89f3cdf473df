"""Constraints: which texts they allow, what is refused and why, and that none can stop or kill the engine."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from services.common.errors import InvalidInput
from services.common.types import Constraint, SamplingParams
from services.grammar import grammars as grammars_module
from services.grammar.grammars import Grammars
from services.grammar.guide import Guide
from tests.tiny_checkpoints import make_tokenizer

TOKENIZER = make_tokenizer("llama")
EOS = TOKENIZER.eos_token_id


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    made = Grammars(TOKENIZER, vocabulary=len(TOKENIZER) + 7, eos_token_ids=[EOS])
    yield made
    made.close()


def schema(value: Any) -> Constraint:
    return Constraint(kind="json_schema", text=value if isinstance(value, str) else json.dumps(value))


def allowed(grammars: Grammars, guide: Guide) -> set[int]:
    return tokens_of(grammars.masks([guide])[0])


def tokens_of(mask_W: np.ndarray) -> set[int]:
    return {token for token in range(32 * len(mask_W)) if mask_W[token // 32] >> token % 32 & 1}


def takes(grammars: Grammars, constraint: Constraint, text: str, **sampling: Any) -> bool:
    """Whether an answer may be this text, token by token, and end there."""
    guide = grammars.guide(SamplingParams(constraint=constraint, **sampling), 500)
    assert guide is not None
    for token in [*TOKENIZER.encode(text, add_special_tokens=False), EOS]:
        if token not in allowed(grammars, guide):
            return False
        guide.take(token)
    return not guide.error


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
}


NODE = {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/node"}}}}
BOTH = [{"properties": {name: {"type": "integer"}}, "required": [name]} for name in "ab"]


@pytest.mark.parametrize(
    ("constraint", "right", "wrong"),
    [
        (Constraint(kind="json_object"), ['{"a": [1, {"b":null}]}', "{}"], ["[1]", '{"a"}', "{} "]),
        (schema(PERSON), ['{"name": "Zoë 中", "age":3}', '{"name":""}'], ['{"age": 3}', '{"name": "x", "y": 1}', "{}"]),
        (schema({**PERSON, "additionalProperties": {"type": "null"}}), ['{"name":"","y":null}'], ['{"name":"","y":1}']),
        (schema({"enum": ["red", 3, None]}), ['"red"', "3", "null"], ["red", "4"]),
        (schema({"const": {"properties": {"a": 1}}}), ['{"properties": {"a": 1}}'], ['{"properties": {}}']),
        (
            schema({"type": "array", "items": {"type": "number"}, "maxItems": 2}),
            ["[]", "[1,2.5]"],
            ["[1,2,3]", "[1,\n2]"],
        ),
        (schema(True), ["3", '"x"', "{}"], ["x"]),
        (schema({"$defs": {"node": NODE}, "$ref": "#/$defs/node"}), ['{"kids": [{}, {"kids":[]}]}'], ['{"kids": [1]}']),
        (schema({"type": "object", "allOf": BOTH}), ['{"a":1,"b":2}', '{"a":1,"b":2,"c":3}'], ['{"a": 1}']),
        (Constraint(kind="choice", choices=("yes", "yes!", 'say "é"\n')), ["yes", "yes!", 'say "é"\n'], ["no", "yes,"]),
        (Constraint(kind="regex", text=r"^\d{3}-[a-z]+$"), ["123-abc"], ["123-", "12-a", "123-abc1"]),
        (Constraint(kind="grammar", text='root ::= "a" x*\nx ::= "b" | "c"'), ["a", "abcb"], ["b", "ad"]),
        (Constraint(kind="grammar", text='start: "a" x*\nx: "b" | /[0-9]{2}/'), ["a", "ab12"], ["a1", "c"]),
    ],
    ids=lambda value: value.kind if isinstance(value, Constraint) else "",
)
def test_a_constraint_takes_its_texts_and_no_others(
    grammars: Grammars, constraint: Constraint, right: list[str], wrong: list[str]
) -> None:
    assert [text for text in right if not takes(grammars, constraint, text)] == []
    assert [text for text in wrong if takes(grammars, constraint, text)] == []


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (schema("{"), "Expecting"),
        (schema("[]"), "expected an object or a boolean"),
        (schema("[" * 30_000), "recursion"),
        (schema({"not": {}}), r'Unimplemented keys: \["not"\]'),
        (schema(False), "Unimplemented keys|Unsatisfiable"),
        (schema({"type": "strnig"}), "Invalid type: strnig"),
        (schema({"type": "array", "uniqueItems": True}), r'Unimplemented keys: \["uniqueItems"\]'),
        (schema({"type": "string", "format": "zip-code"}), "Unknown format: zip-code"),
        (schema({"$ref": "http://127.0.0.1:9/x.json"}), "does not fetch resources"),
        (schema({"x-guidance": {"lenient": True}, "not": {}}), "Unimplemented keys"),
        (schema({"$ref": "#"}), "no text matches it"),
        (Constraint(kind="regex", text="(a"), "regex"),
        (Constraint(kind="regex", text="(?=a)b"), "regex|look-around"),
        (Constraint(kind="grammar", text='start: "a" b'), 'unknown name: "b"'),
        (Constraint(kind="grammar", text='root ::= "a" b'), "Rule 'b' not found"),
        (Constraint(kind="grammar", text="hello"), "cannot be compiled: "),
    ],
    ids=lambda value: value.kind if isinstance(value, Constraint) else "",
)
def test_what_cannot_be_compiled_is_refused_with_the_field_and_the_reason(
    grammars: Grammars, constraint: Constraint, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        grammars.compile(constraint)
    assert caught.value.field == f"sampling.constraint.{constraint.kind}"


def chain(rules: int) -> str:
    lines = (f'a{number}: "x" a{number + 1}' for number in range(rules))
    return "\n".join(("start: a0", *lines, f'a{rules}: "x"'))


HOSTILE = {
    "rules in a chain overflow the stack": Constraint(
        kind="grammar", text="start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(3000)) + '\na3000: "x"'
    ),
    "fewer rules in a chain overflow a thread's stack": Constraint(kind="grammar", text=chain(1000)),
    "hundreds of megabytes": Constraint(kind="regex", text="(a{1000}){1000}"),
    "hours of compilation": schema({"type": "integer", "multipleOf": 9999991}),
    "seconds a mask": Constraint(kind="grammar", text="start: " + '"a"? ' * 12_000),
    "deep brackets": Constraint(kind="regex", text="(" * 30_000 + "a" + ")" * 30_000),
    "deep gbnf": Constraint(kind="grammar", text="root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000),
    "many combinations": schema(
        {"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {}}} for j in range(8)]} for i in range(8)]}
    ),
    "thousands of fields": schema({"properties": {f"f{i}": {} for i in range(4000)}, "additionalProperties": False}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_constraint_is_refused_in_seconds_and_the_next_one_works(grammars: Grammars, name: str) -> None:
    with pytest.raises(InvalidInput, match="^sampling.constraint.*: cannot be compiled: "):
        grammars.compile(HOSTILE[name])
    assert grammars.known(HOSTILE[name]), "asked again, it costs nothing"
    assert takes(grammars, Constraint(kind="choice", choices=("a", name)), name)


def test_many_choices_with_one_beginning(grammars: Grammars) -> None:
    odd = ("a.b*", "a|b", "(a)", "[z]", "\\d", "line\nbreak", " \t#&~-/", "é ü", "<x>", "a", "ab")
    many = Constraint(kind="choice", choices=(*odd, *(f"choice {number} of many" for number in range(2000))))
    for text in (*odd, "choice 7 of many", "choice 1999 of many"):
        assert takes(grammars, many, text), text
    assert not takes(grammars, many, "axb") and not takes(grammars, many, "choice 2000 of many")


def test_what_people_nest_is_not_too_deep(grammars: Grammars) -> None:
    deep: dict[str, Any] = {"type": "integer"}
    for _ in range(50):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    grammars.compile(schema(deep))
    assert takes(grammars, Constraint(kind="grammar", text=chain(100)), "x" * 101)


def test_the_compiling_process_may_die(grammars: Grammars) -> None:
    grammars.compile(Constraint(kind="regex", text="a+"))
    assert grammars._process is not None
    os.kill(grammars._process.pid, signal.SIGKILL)
    time.sleep(0.05)
    assert takes(grammars, Constraint(kind="regex", text="b+"), "bb")


def test_equal_constraints_are_compiled_once_and_the_kept_ones_are_bounded(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = grammars.compile(Constraint(kind="regex", text="once"))
    assert grammars.compile(Constraint(kind="regex", text="once")) is first
    monkeypatch.setattr(grammars_module, "MOST_GRAMMARS", 3)
    for number in range(5):
        grammars.compile(Constraint(kind="regex", text=f"number {number}"))
    assert len(grammars._compiled) == 3 and grammars.known(Constraint(kind="regex", text="once")) is None


@pytest.mark.parametrize(
    "early", [{"min_tokens": 3}, {"ignore_eos": True}, {"min_tokens": 9, "stop_token_ids": (EOS,)}]
)
def test_the_end_waits_unless_nothing_else_is_left(grammars: Grammars, early: dict[str, Any]) -> None:
    a = TOKENIZER.convert_tokens_to_ids("a")
    guide = grammars.guide(SamplingParams(constraint=Constraint(kind="regex", text="a*"), **early), 500)
    assert guide is not None
    for _ in range(3):
        assert allowed(grammars, guide) == {a}
        guide.take(a)
    assert allowed(grammars, guide) == ({a, EOS} if early == {"min_tokens": 3} else {a})
    guide = grammars.guide(SamplingParams(constraint=Constraint(kind="regex", text="a"), **early), 500)
    assert guide is not None
    guide.take(a)
    assert allowed(grammars, guide) == {EOS}, "the constraint leaves nothing but its end"


FORCED = [
    schema(PERSON),
    schema({"enum": ["red", 3, None, "red and blue"]}),
    schema({"$defs": {"node": NODE}, "$ref": "#/$defs/node"}),
    Constraint(kind="choice", choices=("yes", "yes!", 'say "é"\n', "zebra crossing 中文")),
    Constraint(kind="regex", text=r"\d{2}-abcdef(ghi)?x{1,3}"),
    Constraint(kind="grammar", text='start: "a" x*\nx: "bcd" | /[0-9]{2}/'),
]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_a_forced_text_is_looked_for_once_and_comes_as_each_tokens_own_mask_says(family: str) -> None:
    """The masks of random answers, against those that the matcher computes with every token before it consumed."""
    tokenizer, rng, runs = make_tokenizer(family), random.Random(7), 0
    grammars = Grammars(tokenizer, vocabulary=len(tokenizer), eos_token_ids=[tokenizer.eos_token_id])
    for constraint in FORCED * 8:
        guide = grammars.guide(SamplingParams(constraint=constraint), 500)
        assert guide is not None
        slow = grammars.compile(constraint).matcher.deep_copy()
        for _ in range(60):
            kept = len(guide.forced)
            mask_W = grammars.masks([guide])[0]
            bits = np.frombuffer(slow.compute_bitmask(), dtype=np.uint32)
            assert tokens_of(mask_W) == tokens_of(bits), constraint
            runs += len(guide.forced) > 1 and not kept
            token = rng.choice(sorted(tokens_of(mask_W)))
            if token == tokenizer.eos_token_id:
                break
            guide.take(token)
            assert slow.consume_token(token) and not guide.error
    grammars.close()
    assert runs >= 20, "texts of several tokens that were forced"


@pytest.mark.parametrize("closes", [False, True])
def test_an_answer_that_leaves_its_forced_text_or_its_way_to_the_end_is_noticed(
    grammars: Grammars, closes: bool
) -> None:
    """Any token may come out where a row's scores are no numbers."""
    constraint = Constraint(kind="regex", text="[jk]abcdefghi[lm]")
    way = grammars.compile(constraint).way
    assert way
    guide = grammars.guide(SamplingParams(constraint=constraint), len(way) if closes else 500)
    assert guide is not None and guide.closes == closes
    guide.take(way[0])
    assert len(allowed(grammars, guide)) == 1 and len(guide.forced) > 1
    guide.take(TOKENIZER.convert_tokens_to_ids("z"))
    grammars.masks([guide])
    assert guide.error.startswith("cannot be followed any further")


def test_a_tokenizer_that_cannot_spell_a_byte_is_named() -> None:
    description = json.loads(make_tokenizer("qwen2").backend_tokenizer.to_str())
    kept = [token for token in description["model"]["vocab"] if token != "{"]
    description["model"] |= {"vocab": {token: number for number, token in enumerate(kept)}, "merges": []}
    description["added_tokens"] = []
    poor = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(description)), eos_token="a")
    grammars = Grammars(poor, vocabulary=len(poor), eos_token_ids=[poor.eos_token_id])
    with pytest.raises(InvalidInput, match=r"has no token for 1 bytes, the first of them b'\{'"):
        grammars.compile(Constraint(kind="json_object"))
    grammars.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_many_answers_follow_one_constraint_apart(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(grammars_module, "MASK_THREADS", threads)
    monkeypatch.setattr(grammars_module, "SHARED_FROM", 0)
    sampling = SamplingParams(constraint=Constraint(kind="regex", text="[ab]{6}"))
    guides = [guide for _ in range(40) if (guide := grammars.guide(sampling, 500))]
    letters = [TOKENIZER.convert_tokens_to_ids(letter) for letter in "ab"]
    for step in range(6):
        for index, guide in enumerate(guides):
            guide.take(letters[(index + step) % 2])
        masks_nW = grammars.masks(guides)
        assert len(masks_nW) == 40
        if step == 5:
            assert all(tokens_of(mask_W) == {EOS} for mask_W in masks_nW)
        else:
            assert all(set(letters) <= tokens_of(mask_W) for mask_W in masks_nW)
