"""Command-line options of the settings in `focusllava.messages`: one for each that has a line of help."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import click


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
