"""The command `focusllava key`: makes API keys for the gateway. What it needs is imported when it runs."""

from __future__ import annotations

import os
import pathlib
import tempfile

import click


@click.group()
def key() -> None:
    """API keys that the server asks for, once there is a file of them."""


@key.command()
@click.argument("name")
@click.option(
    "--file",
    type=click.Path(dir_okay=False, path_type=pathlib.Path),
    help="Add it to this file of keys, which is made if it is not there; a server that reads it takes it over at once.",
)
@click.option("--requests-per-minute", type=click.IntRange(1), help="Most requests in a minute.")
@click.option("--tokens-per-minute", type=click.IntRange(1), help="Most tokens of prompts and answers in a minute.")
@click.option("--concurrency", type=click.IntRange(1), help="Most requests in flight.")
@click.option("--max-tokens", type=click.IntRange(1), help="Most tokens of one answer.")
def new(name: str, file: pathlib.Path | None, **limits: int | None) -> None:
    """Make a key for NAME and print it, this once: only its SHA-256 is kept.

    The key goes to standard output; what a file of keys must have of it goes to --file, or to standard error.
    """
    from services.gateway.callers import ApiKey
    from services.gateway.keys import hash_of, new_key

    secret = new_key()
    entry = ApiKey(name=name, sha256=hash_of(secret), **limits)
    if file is None:
        click.echo(f"keys:\n{_text(entry)}", err=True, nl=False)
    else:
        _add(file, entry)
        click.echo(f"{entry.name} is in {file}", err=True)
    click.echo(secret)


def _text(entry: object) -> str:
    """An entry as a file of keys has it."""
    said = [f"{name}: {value}" for name, value in vars(entry).items() if value is not None]
    return "  - " + "\n    ".join(said) + "\n"


def _add(file: pathlib.Path, entry: object) -> None:
    """Adds an entry at the file's end, in one step, so that no server reads half. Raises InvalidInput."""
    from services.common.errors import InvalidInput
    from services.gateway.keys import parse_keys

    before = file.read_text("utf8") if file.exists() else "keys:\n"
    if before.strip() != "keys:":
        parse_keys(before)
    text = before + ("" if before.endswith("\n") else "\n") + _text(entry)
    try:
        parse_keys(text)
    except InvalidInput as error:
        if error.field.endswith(".name"):
            raise InvalidInput("is in the file already, choose another or take that entry out", field="name") from None
        raise InvalidInput(f"is {file}, to which none can be added at the end ({error})", field="--file") from None
    mode = file.stat().st_mode & 0o777 if file.exists() else 0o600
    handle, part = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    with os.fdopen(handle, "w", encoding="utf8") as writer:
        os.fchmod(handle, mode)
        writer.write(text)
    os.replace(part, file)
