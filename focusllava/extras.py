"""Parts that the plain install leaves out, loaded by name so that the client depends on nothing of them."""

from __future__ import annotations

import importlib
from types import ModuleType

import click


class NotInstalled(click.ClickException):
    exit_code = 2


def part(module: str, extra: str) -> ModuleType:
    """A module of ours that needs an extra. Raises NotInstalled, which says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise NotInstalled(
            f"{error.name} is not installed, and this command needs it: pip install 'focusllava[{extra}]'"
        ) from None
