"""Options that commands share, and those of `focusllava ask` for answers that must match something."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click


def no_file(context: click.Context, parameter: click.Parameter, question: str) -> str:
    """Refuses a QUESTION that is a file's path: the last image of a command without its question."""
    if question == "-" or os.path.isfile(question):
        raise click.UsageError(f"QUESTION is missing: the last argument, {question!r}, names an image")
    return question


def _read(context: click.Context, parameter: click.Parameter, path: str | None) -> str | None:
    """The text of a file; "-" is standard input."""
    if path is None:
        return None
    try:
        return click.open_file(path, encoding="utf8").read()
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"{path}: {getattr(error, 'strerror', None) or error}") from None


_SAMPLERS = (
    click.option("--threshold", type=float, help="gamma of Eq. 9, in (0, 1]; 1 keeps every visual token."),
    click.option(
        "--keep-ratio", type=float, help="Keep this share of visual tokens instead of by threshold, in (0, 1]."
    ),
    click.option("--no-vision-sampler", is_flag=True, help="Leave the vision-guided sampler out."),
    click.option("--no-text-sampler", is_flag=True, help="Leave the text-guided sampler out."),
)
_CONSTRAINTS = (
    click.option("--json-object", is_flag=True, default=None, help="Answer with a JSON object."),
    click.option("--json-schema", metavar="FILE", callback=_read, help="Answer with JSON that FILE's schema accepts."),
    click.option("--choice", multiple=True, help="Answer with one of these texts; repeat it for each."),
    click.option("--regex", help="Answer with text that this regular expression matches as a whole."),
    click.option("--grammar", metavar="FILE", callback=_read, help="Answer with text of FILE's grammar, Lark or GBNF."),
)


def sampler_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of the paper's two samplers to a command."""
    return _added(command, _SAMPLERS)


def constraint_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options to a command, which takes them as keyword arguments named as the client's settings."""
    return _added(command, _CONSTRAINTS)


def _added(command: Callable[..., Any], options: tuple[Callable[..., Any], ...]) -> Callable[..., Any]:
    for option in reversed(options):
        command = option(command)
    return command
