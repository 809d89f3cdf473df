"""Structured output through the engine: every answer matches its constraint, whatever else is asked and served."""

from __future__ import annotations

import itertools
import json
import pathlib
import re
from typing import Any

import jsonschema
import pytest

from services.common.errors import InvalidInput
from services.common.types import Constraint, GenerateRequest, TokenEvent
from services.llm.engine import Engine
from tests import tiny_llm

SHIPPED = pathlib.Path(__file__).parents[2] / "checkpoints/focusllava-tiny"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}},
        "home": {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"city": {"type": "string"}}}]},
    },
    "required": ["name", "age", "tags", "home"],
}
TREE = {
    "$defs": {"node": {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/node"}}}}},
    "$ref": "#/$defs/node",
}
CONSTRAINTS = [
    Constraint(kind="json_object"),
    *(Constraint(kind="json_schema", text=json.dumps(schema)) for schema in (PERSON, TREE, {"type": "array"}, {})),
    Constraint(kind="choice", choices=("red", "blue", "blue and red")),
    Constraint(kind="regex", text="[0-9]{2,3}-[a-z]{1,4}"),
    Constraint(kind="grammar", text='root ::= "<" item* ">"\nitem ::= "a" | "[" item "]"'),
]
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0},
    {"temperature": 2.0, "top_k": 5, "logprobs": 3},
    {"temperature": 0.7, "top_p": 0.9, "min_p": 0.01, "logit_bias": ((40, 90.0), (41, -100.0))},
    {"repetition_penalty": 2.0, "presence_penalty": 2.0, "frequency_penalty": -2.0},
    {"repetition_penalty": 1e-30, "temperature": 1.0},
    {"min_tokens": 20},
    {"ignore_eos": True, "temperature": 1.0},
)


def assert_matches(constraint: Constraint, text: str) -> None:
    if constraint.kind in ("json_object", "json_schema"):
        schema = json.loads(constraint.text) if constraint.text else {"type": "object"}
        jsonschema.validate(json.loads(text), schema)
    elif constraint.kind == "choice":
        assert text in constraint.choices
    else:
        pattern = constraint.text if constraint.kind == "regex" else r"<[a\[\]]*>"
        assert re.fullmatch(pattern, text) and text.count("[") == text.count("]")


def requests(engine: Engine, max_tokens: int = 50) -> list[GenerateRequest]:
    """Every constraint with every setting, with and without images."""
    return [
        tiny_llm.request(
            engine,
            f"{number}",
            images=((), (40,))[number % 2],
            threshold=0.5,
            **{"max_tokens": max_tokens, "seed": number, "ignore_eos": False, "constraint": constraint, **settings},
        )
        for number, (constraint, settings) in enumerate(itertools.product(CONSTRAINTS, SETTINGS))
    ]


@pytest.mark.parametrize("model", ["shipped", "llama", "mistral", "qwen2"])
def test_every_answer_matches_its_constraint(model: str) -> None:
    if model == "shipped":
        engine = Engine.from_checkpoint(SHIPPED, kv_cache_bytes=64 * 2**20, max_running=32)
        asked = [request for request in requests(engine) if not request.images]
    else:
        engine = tiny_llm.engine(model)
        asked = requests(engine)
    answers = tiny_llm.run(engine, asked)
    assert len(answers) == len(asked)
    for request in asked:
        ids, text, finished = answers[request.request_id]
        constraint = request.sampling.constraint
        assert constraint is not None
        assert_matches(constraint, text)
        assert finished.reason in ("stop", "length") and len(ids) <= 50
    # A model that never closes its string is closed before max_tokens, and says so.
    assert any(finished.reason == "length" for _, _, finished in answers.values())
    engine.grammars.close()


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[list[int], str]]:
    """Answers to each request by itself."""
    engine = tiny_llm.engine()
    return {r.request_id: tiny_llm.run(engine, [r])[r.request_id][:2] for r in some(engine)}


def some(engine: Engine) -> list[GenerateRequest]:
    """Each constraint and each setting at least once."""
    return requests(engine)[::5]


def test_a_batch_of_constrained_and_free_answers_changes_none(alone: dict[str, tuple[list[int], str]]) -> None:
    engine = tiny_llm.engine()
    asked = some(engine)
    free = [
        tiny_llm.request(engine, f"free-{i}", images=((), (25,))[i % 2], max_tokens=9 + i) for i in range(len(asked))
    ]
    expected = {name: answer[:2] for name, answer in tiny_llm.run(tiny_llm.engine(), free).items()}
    answers = tiny_llm.run(engine, [r for pair in zip(asked, free, strict=True) for r in pair])
    assert {name: answer[:2] for name, answer in answers.items()} == {**alone, **expected}


def test_a_preempted_answer_goes_on_in_its_constraint(alone: dict[str, tuple[list[int], str]]) -> None:
    cache = tiny_llm.engine().cache
    engine = tiny_llm.engine(kv_cache_bytes=10 * cache.block_bytes)
    asked = some(engine)
    answers = tiny_llm.run(engine, asked)
    assert engine.stats().preemptions
    assert {name: answer[:2] for name, answer in answers.items()} == {r.request_id: alone[r.request_id] for r in asked}


def test_log_probabilities_are_the_models_own_under_a_constraint() -> None:
    engine = tiny_llm.engine()
    free = tiny_llm.request(engine, images=(), max_tokens=1, logprobs=20)
    bound = tiny_llm.request(
        engine, images=(), max_tokens=1, logprobs=20, constraint=Constraint(kind="choice", choices=("zebra",))
    )

    def first(request: GenerateRequest) -> Any:
        engine.submit(request)
        (event,) = (event for _, event in engine.step() if isinstance(event, TokenEvent))
        return event.logprobs[0]

    assert first(free).top == first(bound).top
    assert first(bound).chosen.logprob < first(free).chosen.logprob


def test_a_stop_string_and_a_stop_token_cut_what_the_constraint_would_go_on_with() -> None:
    engine = tiny_llm.engine()
    constraint = Constraint(kind="choice", choices=("one, two, three",))
    token = engine.renderer.tokenizer.convert_tokens_to_ids(",")
    for settings, text in (({"stop": ("o, t",)}, "one, tw"), ({"stop_token_ids": (token,)}, "one")):
        answer = tiny_llm.run(engine, [tiny_llm.request(engine, max_tokens=99, constraint=constraint, **settings)])["r"]
        assert answer[1] == text and answer[2].reason == "stop"


def test_too_few_tokens_for_the_end_are_a_cut_answer() -> None:
    engine = tiny_llm.engine()
    constraint = Constraint(kind="choice", choices=("one two three four five six",))
    ids, text, finished = tiny_llm.run(engine, [tiny_llm.request(engine, max_tokens=3, constraint=constraint)])["r"]
    assert finished.reason == "length" and len(ids) == 3 and "one two three four five six".startswith(text)


def test_a_constraint_that_cannot_go_on_ends_its_own_request_alone() -> None:
    engine = tiny_llm.engine()
    other = tiny_llm.request(engine, "other", max_tokens=6)
    expected = tiny_llm.run(engine, [other])["other"]
    engine.submit(tiny_llm.request(engine, "bad", constraint=Constraint(kind="json_object")))
    engine.submit(other)
    engine.step()
    guide = engine._sequences["bad"].guide
    assert guide is not None
    guide.error = "cannot be followed any further: for this test"
    events = []
    while engine.has_work():
        events += engine.step()
        engine.check_integrity()
    (error,) = (event for name, event in events if name == "bad")
    assert isinstance(error, InvalidInput) and error.field == "sampling.constraint.json_object"
    again = tiny_llm.run(engine, [tiny_llm.request(engine, "other", max_tokens=6)])["other"]
    assert again[:2] == expected[:2] and engine.stats().running == 0
