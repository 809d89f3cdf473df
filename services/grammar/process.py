"""A process that turns constraints into grammars, so that no grammar can stop or kill the language model.

Clients send grammars: some take hours to compile, and a few thousand rules in a chain overflow the compiler's stack,
which ends its process. So each is compiled first in a fork of this process, with a bound on its time and stack. Run as
`python -m services.grammar.process`: the first line of standard input describes the tokenizer, each later one is a
constraint, answered by one line: {"grammar": text} or {"error": text}.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import sys
import threading
from typing import Any

import llguidance

COMPILE_S = 2.0
"""Longest processor time of a compilation; a usual schema takes some milliseconds."""
WAIT_S = 20.0
"""Longest time of a compilation by the clock, for a machine that is busy."""
STACK_BYTES = 2**20
"""Stack that a compilation may take. What passes is compiled again by the language model's process, whose threads have
2 MiB at least (glibc's default where the stack has no limit): an overflow there would end the replica."""
MOST_BYTES = 64 * 2**20
"""Memory that a compiled constraint and its first mask may take; a usual one takes 6 MB with a vocabulary of 128,000. A
repetition of a repetition takes hundreds, and the language model's process keeps some dozens of constraints."""
LIMITS: dict[str, Any] = {
    "max_grammar_size": 5_000,
    "step_max_items": 5_000,
    "max_items_in_row": 500,
    "max_lexer_states": 25_000,
    "verbose_errors": False,
}
"""Bounds of the compiler: ten times what a schema of 100 optional fields needs. A hostile grammar's slowest mask takes
0.3 s, not 8."""
_JSON = {
    # At most one space after a comma or a colon, and no other: a weak model could put spaces for ever.
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "lenient": False,
    "coerce_one_of": False,
}
_COMBINING = {"allOf", "anyOf", "oneOf", "$ref", "$dynamicRef", "if", "not", "dependentSchemas"}
_OPEN_WITH = {"additionalProperties", "unevaluatedProperties", "patternProperties"}


def limits() -> llguidance.LLParserLimits:
    return llguidance.LLParserLimits(**LIMITS)


def grammar_of(kind: str, text: str, choices: list[str]) -> str:
    """A constraint in the compiler's own form. Raises ValueError."""
    if kind == "json_object":
        return _json_grammar({"type": "object"})
    if kind == "json_schema":
        return _json_grammar(json.loads(text))
    if kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(text)
    if kind == "choice":
        # The compiler's own form of a choice follows each text apart, and gives up beyond some hundreds.
        return llguidance.LLMatcher.grammar_from_regex("|".join(map(re.escape, choices)))
    return llguidance.grammar_from("grammar" if "::=" in text else "lark", text)


def _json_grammar(schema: Any) -> str:
    if not isinstance(schema, dict | bool):
        raise ValueError("expected an object or a boolean")
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if _may_close(schema):
        schema = _closed(schema)
    return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON)  # type: ignore[arg-type]


def _may_close(schema: Any) -> bool:
    """Whether each object is described in one place, so that what it does not list can be left out of it."""
    if isinstance(schema, list):
        return all(map(_may_close, schema))
    if not isinstance(schema, dict):
        return True
    described_elsewhere = "properties" in schema and _COMBINING & schema.keys()
    return not described_elsewhere and "allOf" not in schema and all(map(_may_close, schema.values()))


def _closed(schema: Any) -> Any:
    """The schema with objects that hold their listed properties alone, unless it says what else they hold.

    Each answer still matches the schema as it was sent. A weak model would otherwise add properties without end.
    """
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {
        key: value if key in ("enum", "const", "default", "examples") else _closed(value)
        for key, value in schema.items()
    }
    if isinstance(schema.get("properties"), dict) and not _OPEN_WITH & schema.keys():
        closed["additionalProperties"] = False
    return closed


def _checked(tokenizer: llguidance.LLTokenizer, constraint: dict[str, Any]) -> dict[str, str]:
    try:
        grammar = grammar_of(**constraint)
    except (ValueError, RecursionError) as error:
        return {"error": str(error)}
    before = _resident_bytes()
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits())
    allows_any = not matcher.is_error() and any(matcher.compute_bitmask()) and not matcher.is_error()
    if _resident_bytes() - before > MOST_BYTES:
        return {"error": f"takes more than {MOST_BYTES // 2**20} MiB of memory"}
    if allows_any:
        return {"grammar": grammar}
    reason = matcher.get_error().removesuffix("<non-verbose/>").strip()
    return {"error": "no text matches it" if reason in ("", "NoExtensionBias") else reason}


def _resident_bytes() -> int:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _answer(write_end: int, tokenizer: llguidance.LLTokenizer, constraint: dict[str, Any]) -> None:
    """Writes one line of JSON and ends the process."""
    with os.fdopen(write_end, "w") as answer:
        answer.write(json.dumps(_checked(tokenizer, constraint)))
    os._exit(0)


def _check_in_a_fork(tokenizer: llguidance.LLTokenizer, constraint: dict[str, Any]) -> str:
    """The answer to one constraint, a line of JSON."""
    end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        signal.setitimer(signal.ITIMER_VIRTUAL, COMPILE_S)  # nobody handles the signal: it ends the process
        signal.setitimer(signal.ITIMER_REAL, WAIT_S)
        threading.stack_size(STACK_BYTES)
        compiling = threading.Thread(target=_answer, args=(write_end, tokenizer, constraint))
        compiling.start()
        compiling.join()
        os._exit(1)  # the thread ends the process itself when all is well
    os.close(write_end)
    with os.fdopen(end) as answer:
        line = answer.read()
    _, status = os.waitpid(child, 0)
    if status == 0:
        return line
    ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if ended_by in (signal.SIGVTALRM, signal.SIGALRM):
        return json.dumps({"error": f"takes more than {COMPILE_S:g} s to compile"})
    return json.dumps({"error": "is nested too deeply" if ended_by else "the compiler failed; see the server's log"})


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the server, which then closes the pipe
    about = json.loads(sys.stdin.readline() or sys.exit())
    tokenizer = llguidance.LLTokenizer(about["tokenizer"], n_vocab=about["vocabulary"], eos_token=about["eos"])
    for line in sys.stdin:
        print(_check_in_a_fork(tokenizer, json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
