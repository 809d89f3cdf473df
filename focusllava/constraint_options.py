"""Options of `focusllava ask` for answers that must match something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


def _read(context: click.Context, parameter: click.Parameter, path: str | None) -> str | None:
    """The text of a file; "-" is standard input."""
    if path is None:
        return None
    try:
        return click.open_file(path, encoding="utf8").read()
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"{path}: {getattr(error, 'strerror', None) or error}") from None


_OPTIONS = (
    click.option("--json-object", is_flag=True, default=None, help="Answer with a JSON object."),
    click.option("--json-schema", metavar="FILE", callback=_read, help="Answer with JSON that FILE's schema accepts."),
    click.option("--choice", multiple=True, help="Answer with one of these texts; repeat it for each."),
    click.option("--regex", help="Answer with text that this regular expression matches as a whole."),
    click.option("--grammar", metavar="FILE", callback=_read, help="Answer with text of FILE's grammar, Lark or GBNF."),
)


def constraint_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options to a command, which takes them as keyword arguments named as the client's settings."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
