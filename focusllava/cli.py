"""The command `focusllava`: ask, info and completion here, the others by entry point (`focusllava/extras.py`)."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import click
import grpc
from click.shell_completion import get_completion_class

from focusllava import Answer, FocusClient, FocusClientError, ImageSource, RetryPolicy, __version__, extras, user
from focusllava.accounting import accounting_lines, logprob_lines
from focusllava.arguments import MAX_TIMEOUT_S
from focusllava.connection import DEFAULT_ADDRESS
from focusllava.errors import NO_SERVER
from focusllava.messages import Settings
from focusllava.options import constraint_options, no_file, setting_options, writable_png

PROGRAM = "focusllava"
EPILOG = """\b
Exit codes:
  0    done
  1    internal error
  2    wrong usage of the command
  3    bad input: not an image, a value out of range, an API key that is refused
  4    server unreachable, or the service is not deployed there
  5    deadline passed, or cancelled
  6    the server is full, or the request too large for it
  130  interrupted
"""
EXIT_CODES = {
    "INVALID_ARGUMENT": 3,
    "FAILED_PRECONDITION": 3,
    "OUT_OF_RANGE": 3,
    "UNAUTHENTICATED": 3,
    "PERMISSION_DENIED": 3,
    "UNAVAILABLE": 4,
    "NOT_FOUND": 4,
    "UNIMPLEMENTED": 4,
    "DEADLINE_EXCEEDED": 5,
    "CANCELLED": 5,
    "RESOURCE_EXHAUSTED": 6,
}
_address = click.option(
    "--address",
    envvar="FOCUSLLAVA_ADDRESS",
    default=DEFAULT_ADDRESS,
    show_default=True,
    help="host:port of the gateway.",
)
_timeout = click.option(
    "--timeout",
    type=click.FloatRange(0, MAX_TIMEOUT_S, min_open=True),
    default=120.0,
    show_default=True,
    help="Seconds.",
)
_api_key = click.option(
    "--api-key",
    envvar="FOCUSLLAVA_API_KEY",
    show_envvar=True,
    help="For a server that asks for one, or a proxy in front of it; other users of the machine see the option.",
)
_tls = click.option("--tls", is_flag=True, help="Speak TLS, as a proxy in front of the gateway does.")
_tls_ca = click.option(
    "--tls-ca",
    type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path),
    help="Speak TLS, and trust this PEM file's certificates instead of gRPC's own.",
)
_as_json = click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")


class Commands(click.Group):
    """The client's own commands, and those that other parts bring; these are loaded when they are named or listed."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted({*super().list_commands(context), *extras.names(extras.COMMANDS)})

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        return super().get_command(context, name) or extras.load(extras.COMMANDS, name)


@click.group(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name=PROGRAM)
def cli() -> None:
    """High-resolution image questions at a fraction of the visual tokens."""


@cli.command()
@click.argument("images", metavar="[IMAGE]...", nargs=-1, type=click.Path(allow_dash=True))
@click.argument("question", callback=no_file)
@click.option("--local", metavar="CHECKPOINT", help="Answer here, without a server (needs the [serve] extra).")
@click.option(
    "--detail",
    type=click.Choice(["low", "high", "auto"]),
    help="low: the model sees each image in one tile alone, for a fraction of the visual tokens.",
)
@click.option(
    "--reduced-jpeg/--whole-jpeg",
    default=None,
    help="Whether large JPEGs may be decoded at reduced scale; without it, as the served checkpoint says.",
)
@click.option(
    "--map-share",
    type=float,
    help="Let the vision-guided sampler leave no more than this share of an image's feature map, in (0, 1].",
)
@click.option(
    "--map",
    "drawing",
    metavar="OUT.png",
    type=click.Path(dir_okay=False, path_type=pathlib.Path),
    callback=writable_png,
    help="Draw what both samplers chose of each image (needs the [serve] extra).",
)
@setting_options(Settings)
@constraint_options
@_as_json
@_address
@_timeout
@_api_key
@_tls
@_tls_ca
def ask(
    images: tuple[str, ...],
    question: str,
    local: str | None,
    detail: str | None,
    reduced_jpeg: bool | None,
    map_share: float | None,
    drawing: pathlib.Path | None,
    as_json: bool,
    address: str,
    timeout: float,
    api_key: str | None,
    tls: bool,
    tls_ca: pathlib.Path | None,
    **given: Any,
) -> None:
    """Ask QUESTION about no, one or several images; IMAGE "-" is standard input.

    The answer streams to standard output, its accounting to standard error.
    """
    settings: Settings = {name: value for name, value in given.items() if value not in (None, ())}  # type: ignore[assignment]
    sources: list[ImageSource] = [sys.stdin.buffer if image == "-" else image for image in images]
    turns = [user(question, images=sources, detail=detail, reduced_jpeg=reduced_jpeg, map_share=map_share)]
    if drawing is not None:
        if not images:
            raise click.UsageError("--map needs an IMAGE to draw on")
        draw = extras.load(extras.PARTS, "focus_sheet")  # first: it may not be installed
        settings["return_map"] = True
    if local is not None:
        with extras.load(extras.PARTS, "LocalModel")(local) as model:
            answer = _show(model.stream(turns, **settings), as_json)
    else:
        credentials, retry = _credentials(tls, tls_ca), RetryPolicy(on_wait=_say_once())
        with FocusClient(address, timeout_s=timeout, api_key=api_key, credentials=credentials, retry=retry) as client:
            answer = _show(client.chat(turns, **settings), as_json)
    if drawing is not None:
        if answer.focus is None:
            raise FocusClientError("UNIMPLEMENTED", "--map: the server sent no map, its version is an older one")
        files = [getattr(part, "data", part) for part in turns[0].parts if not isinstance(part, str)]
        draw(files, answer.focus).save(drawing, "PNG")
        click.echo(f"wrote {drawing}", err=True)


def _show(stream: Any, as_json: bool) -> Answer:
    """Prints an answer as it comes, served or local, closes its stream, and gives it back."""
    with stream:
        if not as_json:
            try:
                for text in stream:
                    click.echo(text, nl=False)
                    sys.stdout.flush()
            finally:
                if stream.text:
                    click.echo()
        answer = stream.result()
    if as_json:
        told = dataclasses.asdict(dataclasses.replace(answer, focus=None))  # a map is drawn, not printed
        facts = {name: told[name] for name in Answer.__dataclass_fields__ if name != "focus"}
        click.echo(json.dumps(facts, ensure_ascii=False, default=list))  # bytes as numbers
    else:
        click.echo("\n".join([*logprob_lines(answer), *accounting_lines(answer)]), err=True)
    return answer


@cli.command()
@click.argument("checkpoint", required=False, type=click.Path(file_okay=False, path_type=pathlib.Path))
@click.option("--verify", is_flag=True, help="Hash the weights of CHECKPOINT again (needs the [serve] extra).")
@_as_json
@_address
@_api_key
@_tls
@_tls_ca
def info(
    checkpoint: pathlib.Path | None,
    verify: bool,
    as_json: bool,
    address: str,
    api_key: str | None,
    tls: bool,
    tls_ca: pathlib.Path | None,
) -> None:
    """Describe a CHECKPOINT folder or, without one, what the server at --address serves."""
    if checkpoint is not None:
        facts = extras.load(extras.PARTS, "checkpoint_facts")(checkpoint, verify=verify)
    elif verify:
        raise click.UsageError("--verify needs a CHECKPOINT")
    else:
        credentials, retry = _credentials(tls, tls_ca), RetryPolicy(attempts=2)
        with FocusClient(address, timeout_s=20, api_key=api_key, credentials=credentials, retry=retry) as client:
            facts = dataclasses.asdict(client.model_info())
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
    else:
        width = max(map(len, facts))
        for name, value in facts.items():
            shown = f"{value:.4g}" if isinstance(value, float) else value
            click.echo(f"{name.replace('_', ' '):<{width}}  {shown}")


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a SHELL.

    For bash: eval "$(focusllava completion bash)"
    """
    completer = get_completion_class(shell)
    assert completer is not None
    click.echo(completer(cli, {}, PROGRAM, "_FOCUSLLAVA_COMPLETE").source())


def _say_once() -> Callable[[FocusClientError], None]:
    """Tells a person, the first time, why nothing happens yet."""
    said: list[str] = []

    def say(error: FocusClientError) -> None:
        if not said:
            said.append(error.message)
            click.echo(f"{PROGRAM}: waiting: {error.message}", err=True)

    return say


def _credentials(tls: bool, ca: pathlib.Path | None) -> grpc.ChannelCredentials | None:
    """None speaks no TLS."""
    if ca is None:
        return grpc.ssl_channel_credentials() if tls else None
    roots = ca.read_bytes()
    if b"-----BEGIN CERTIFICATE-----" not in roots:  # gRPC would only say that no connection came about
        raise FocusClientError("INVALID_ARGUMENT", f"--tls-ca: {ca} holds no certificate in PEM format")
    return grpc.ssl_channel_credentials(roots)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return cli.main(arguments, prog_name=PROGRAM, standalone_mode=False) or 0
    except (click.Abort, KeyboardInterrupt):
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except ModuleNotFoundError as error:
        click.echo(f"{PROGRAM}: {extras.not_installed(error, 'this command')}", err=True)
        return 2
    except Exception as error:
        return _fail(error, as_json="--json" in arguments)


def _fail(error: Exception, *, as_json: bool) -> int:
    """One line for a person, or one object for a program; returns the exit code."""
    # The services' errors are known by their `code`: importing their class would bring the services with it.
    code = getattr(error, "code", "INTERNAL")
    code = getattr(code, "value", code)
    message = getattr(error, "message", str(error)) or type(error).__name__
    if as_json:
        click.echo(json.dumps({"error": {"code": code, "message": message}}, ensure_ascii=False))
    else:
        advice = "; `focusllava serve` starts a server" if message.startswith(NO_SERVER) else ""
        click.echo(f"{PROGRAM}: {message} ({code}){advice}", err=True)
    return EXIT_CODES.get(code, 1)


if __name__ == "__main__":
    sys.exit(main())
