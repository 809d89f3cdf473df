"""Options that commands share: one for each setting in `focusllava.messages` that has a line of help, and others."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import click


def no_file(context: click.Context, parameter: click.Parameter, question: str) -> str:
    """Refuses a QUESTION that is a file's path: the last image of a command without its question."""
    if question == "-" or os.path.isfile(question):
        raise click.UsageError(f"QUESTION is missing: the last argument, {question!r}, names an image")
    return question


def writable_png(context: click.Context, parameter: click.Parameter, path: pathlib.Path | None) -> pathlib.Path | None:
    """Refuses a drawing's path that is not a PNG's, or lies in no folder, before anything is asked."""
    if path is not None and path.suffix.lower() != ".png":
        raise click.BadParameter(f"is {str(path)!r}, expected a name that ends in .png")
    if path is not None and not path.parent.is_dir():
        raise click.BadParameter(f"is {str(path)!r}, which lies in no folder that exists")
    return path


def _read(context: click.Context, parameter: click.Parameter, path: str | None) -> str | None:
    """The text of a file; "-" is standard input."""
    if path is None:
        return None
    try:
        return click.open_file(path, encoding="utf8").read()
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"{path}: {getattr(error, 'strerror', None) or error}") from None


_CONSTRAINTS = (
    click.option("--json-object", is_flag=True, default=None, help="Answer with a JSON object."),
    click.option("--json-schema", metavar="FILE", callback=_read, help="Answer with JSON that FILE's schema accepts."),
    click.option("--choice", multiple=True, help="Answer with one of these texts; repeat it for each."),
    click.option("--regex", help="Answer with text that this regular expression matches as a whole."),
    click.option("--grammar", metavar="FILE", callback=_read, help="Answer with text of FILE's grammar, Lark or GBNF."),
)


def setting_options(settings: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds an option for each setting of a TypedDict to a command, which takes them as keyword arguments of its names.

    An option that is not given is None, or () where it may be repeated.
    """

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for name, hint in reversed(get_type_hints(settings, include_extras=True).items()):
            if get_origin(hint) is Annotated:
                kinds, text = get_args(hint)
                command = _option(name.replace("_", "-"), get_args(kinds), text)(command)
        return command

    return add


def _option(name: str, kinds: tuple[Any, ...], text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    if kinds[0] is bool:
        return click.option(f"--{name}/--no-{name}", default=None, help=text)
    several = any(get_origin(kind) is Sequence for kind in kinds)
    return click.option(f"--{name}", type=kinds[0], multiple=several, help=text)


def constraint_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options to a command, which takes them as keyword arguments named as the client's settings."""
    for option in reversed(_CONSTRAINTS):
        command = option(command)
    return command
