"""Parts that the plain install leaves out, loaded by name so that the client depends on nothing of them."""

from __future__ import annotations

import importlib
import os
import pathlib
from types import ModuleType

import click

from focusllava.errors import FocusClientError


class NotInstalled(click.ClickException):
    exit_code = 2


def part(module: str, extra: str) -> ModuleType:
    """A module of ours that needs an extra. Raises NotInstalled, which says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise NotInstalled(
            f"{error.name} is not installed, and this command needs it: "
            f"pip install '.[{extra}]' in FocusLLaVA's source tree"
        ) from None


def find_checkpoint(folder: str | None) -> pathlib.Path:
    """The folder given, FOCUSLLAVA_CHECKPOINT, or the shipped one, which an installed package lacks."""
    checks = part("cluster.checks", "serve")
    named = folder or os.environ.get(checks.CHECKPOINT_VARIABLE)
    if not named and not checks.DEFAULT_CHECKPOINT.is_dir():
        raise FocusClientError(
            "INVALID_ARGUMENT",
            f"checkpoint: none is named, and the shipped one is only in the source tree: "
            f"name a folder, or set {checks.CHECKPOINT_VARIABLE} (looked for {checks.DEFAULT_CHECKPOINT})",
        )
    return checks.find_checkpoint(folder)
