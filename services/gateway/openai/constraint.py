"""What an answer must match, as OpenAI's response_format and vLLM's fields say it -> Constraint."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from focusllava.v1 import llm_pb2
from services.common.errors import InvalidInput
from services.gateway.openai.fields import Fields, Wrong, shown


def _schema_text(value: Any) -> Any:
    """A JSON Schema as JSON text. Raises ValueError for what is none."""
    if isinstance(value, dict | bool):
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if isinstance(value, str):
        return value
    raise ValueError(f"is {shown(repr(value))}, expected a JSON Schema")


Schema = Annotated[str, BeforeValidator(_schema_text)]
Choices = Annotated[list[str], Field(fail_fast=True)]


class JsonSchema(Fields):
    """A schema and its name. An answer always matches it, whatever `strict` says."""

    without_effect = {"name": None, "description": None, "strict": None}
    schema_: Schema = Field(alias="schema", default="true")


class ResponseFormat(Fields):
    """OpenAI's field of this name; `schema` beside "json_object" is llama.cpp's and others'."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: Schema | None = Field(alias="schema", default=None)

    @model_validator(mode="after")
    def _holds_its_type(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError(f"has type {self.type!r}, expected json_schema with 'json_schema' and only with it")
        if self.schema_ is not None and self.type != "json_object":
            raise Wrong("schema", f"is not supported with type {self.type!r}, expected 'json_object'")
        return self


class StructuredOutputs(Fields):
    """vLLM's field of this name."""

    without_effect = {
        "disable_fallback": None,
        "disable_any_whitespace": (False,),
        "disable_additional_properties": (False,),
        "whitespace_pattern": (),
        "structural_tag": (),
    }
    json_: Schema | None = Field(alias="json", default=None)
    choice: Choices | None = None
    regex: str | None = None
    grammar: str | None = None
    json_object: bool = False


class Constrained(Fields):
    """A request whose answer may have to match something."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs = StructuredOutputs()
    # Fields that vLLM had before structured_outputs.
    guided_json: Schema | None = None
    guided_choice: Choices | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None

    def constraint(self) -> tuple[str, llm_pb2.Constraint | None]:
        """The field that sets it, and what it is; ("", None) where none does. Raises InvalidInput for more than one."""
        outputs = self.structured_outputs
        found = [
            *_of_format(self.response_format),
            *_of_fields("structured_outputs.", outputs.json_, outputs.choice, outputs.regex, outputs.grammar),
            *_of_fields("guided_", self.guided_json, self.guided_choice, self.guided_regex, self.guided_grammar),
        ]
        if outputs.json_object:
            found.append(("structured_outputs.json_object", llm_pb2.Constraint(json_object=True)))
        if len(found) > 1:
            raise InvalidInput(f"is set beside {found[0][0]}, expected one of them", field=found[1][0])
        return found[0] if found else ("", None)


def _of_format(asked: ResponseFormat | None) -> list[tuple[str, llm_pb2.Constraint]]:
    if asked is None or asked.type == "text":
        return []
    if asked.schema_ is not None:
        return [("response_format.schema", llm_pb2.Constraint(json_schema=asked.schema_))]
    if asked.json_schema is None:
        return [("response_format", llm_pb2.Constraint(json_object=True))]
    schema = llm_pb2.Constraint(json_schema=asked.json_schema.schema_)
    return [("response_format.json_schema.schema", schema)]


def _of_fields(prefix: str, schema: str | None, choice: list[str] | None, regex: str | None,
               grammar: str | None) -> list[tuple[str, llm_pb2.Constraint]]:  # fmt: skip
    found = []
    if schema is not None:
        found.append((f"{prefix}json", llm_pb2.Constraint(json_schema=schema)))
    if choice is not None:
        found.append((f"{prefix}choice", llm_pb2.Constraint(choice=llm_pb2.Choices(texts=choice))))
    if regex is not None:
        found.append((f"{prefix}regex", llm_pb2.Constraint(regex=regex)))
    if grammar is not None:
        found.append((f"{prefix}grammar", llm_pb2.Constraint(grammar=grammar)))
    return found
