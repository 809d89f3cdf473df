"""The commands `focusllava serve`, `import`, `export` and `assemble`.

They import what they need when they run: `focusllava --help` loads this module.
"""

from __future__ import annotations

import contextlib
import pathlib
import sys
import time
from typing import Any, Self

import click

from focusllava.sizes import parse_size

POLL_S = 5.0
DTYPES = {
    "auto": "auto", "float32": "float32", "float": "float32", "bfloat16": "bfloat16", "float16": "float16",
    "half": "float16",
}  # fmt: skip
"""Names of dtypes, vLLM's and ours, and what each means."""


class Size(click.ParamType):
    """Bytes or tokens, as 4GiB, 2.5G, 8k or plain digits."""

    name = "size"

    def convert(self, value: str | int, param: click.Parameter | None, context: click.Context | None) -> int:
        try:
            size = value if isinstance(value, int) else parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, context)
        return size if size > 0 else self.fail(f"{value!r} is not above 0", param, context)


@click.command()
@click.argument("checkpoint", required=False, type=click.Path(file_okay=False))
@click.option("--host", default="127.0.0.1", show_default=True, help="Where both APIs listen; 0.0.0.0: everywhere.")
@click.option("--grpc-port", type=click.IntRange(0, 65535), default=9000, show_default=True, help="0: a free one.")
@click.option(
    "--port",
    "--http-port",
    "http_port",
    type=click.IntRange(0, 65535),
    default=0,
    help="Of OpenAI's API; 0: 8000, or a free one.",
)
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path),
    metavar="FILE",
    help="A Serve configuration, as cluster/serve-a100.yaml; the options here go before what it says.",
)
@click.option(
    "--api-keys",
    type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path),
    metavar="FILE",
    help="Answer those alone who bring a key that is in FILE; `focusllava key new NAME --file FILE` makes one.",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    help="Of the services' logs: lines for people, or JSON for machines.  [default: FOCUSLLAVA_LOG_FORMAT, then text]",
)
@click.option("--device", metavar="NAME", help="cpu, cuda, or auto: a GPU when there is one.  [default: auto]")
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES), case_sensitive=False),
    metavar="NAME",
    help="float32, bfloat16, float16, or auto: what the device multiplies best in.  [default: auto]",
)
@click.option(
    "--kv-cache-memory",
    "--kv-cache-memory-bytes",
    "kv_cache_bytes",
    type=Size(),
    metavar="SIZE",
    help="Of one replica of the language model, as 4GiB.  [default: what is free]",
)
@click.option(
    "--max-model-len",
    type=Size(),
    metavar="TOKENS",
    help="Prompt and answer together, as 8192 or 8K.  [default: the model's own]",
)
@click.option("--gpu-memory-utilization", "memory_share", type=click.FloatRange(0, 1, min_open=True), metavar="SHARE",
              help="Of a GPU's memory, or of a CPU's that is free, what to use.  [default: 0.9]")  # fmt: skip
def serve(
    checkpoint: str | None,
    host: str,
    grpc_port: int,
    http_port: int,
    config: pathlib.Path | None,
    api_keys: pathlib.Path | None,
    log_format: str | None,
    dtype: str | None,
    **wishes: Any,
) -> None:
    """Serve CHECKPOINT on this machine until Ctrl-C.

    Default: FOCUSLLAVA_CHECKPOINT, then the shipped one, which is in the source tree and not in an installed package.
    Sizes and places follow from the checkpoint and the machine, and are printed; what could never answer one image of
    the largest size is refused before anything is loaded.
    """
    from cluster import local, placing
    from cluster.interrupts import signals_interrupt
    from services.checkpoint.finding import find_checkpoint
    from services.common.logs import FORMAT
    from services.gateway.keys import read_keys

    folder, file = find_checkpoint(checkpoint), config or local.SERVE_CONFIG
    if api_keys:
        names = [key.name for key in read_keys(api_keys)]
        click.echo(f"answers only who has a key of {api_keys}: {', '.join(names) or 'nobody yet'}")
    wished = placing.Wishes(dtype=DTYPES[dtype] if dtype else None, **wishes)
    placement = placing.place(folder, file, wished)
    for line in placement.lines:
        click.echo(line)
    try:
        with (
            signals_interrupt(),
            local.LocalCluster(
                checkpoint=folder,
                host=host,
                grpc_port=grpc_port,
                http_port=http_port,
                config=file,
                api_keys=api_keys,
                env={FORMAT: log_format} if log_format else {},
                **placement.cluster_arguments,
            ) as cluster,
        ):
            cluster.start(click.echo)
            click.echo("\n".join(local.opened(cluster.state)))
            click.echo(f"ask: focusllava ask --address {cluster.grpc_address} IMAGE QUESTION; Ctrl-C stops it")
            try:
                while cluster.state.pids():
                    time.sleep(POLL_S)
            except KeyboardInterrupt:
                with contextlib.suppress(OSError):  # the terminal may be gone
                    click.echo("stopping")
                return
            logs = cluster.state.temp_dir
            cluster.stop(keep_logs=True)
            raise local.ClusterError(f"Ray has ended: something else stopped it, or it died; its logs, if any: {logs}")
    except local.ClusterError as error:
        raise click.ClickException(str(error)) from None


@click.command("import")
@click.argument("source", metavar="SRC", type=click.Path(exists=True, file_okay=False, path_type=pathlib.Path))
@click.argument("destination", metavar="DST", type=click.Path(file_okay=False, path_type=pathlib.Path))
def import_checkpoint(source: pathlib.Path, destination: pathlib.Path) -> None:
    """Turn a hub-format LLaVA-NeXT folder SRC into a FocusLLaVA checkpoint DST, with fresh samplers.

    Before DST appears it answers two tokens about an image, with as many layers as half of the free memory holds.
    """
    from cluster.dry_run import dry_run
    from services.checkpoint.import_llava_next import import_llava_next

    with _Percent("importing") as percent:
        click.echo(import_llava_next(source, destination, progress=percent, dry_run=dry_run))


@click.command("assemble")
@click.argument("destination", metavar="DST", type=click.Path(file_okay=False, path_type=pathlib.Path))
@click.option(
    "--text",
    required=True,
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=pathlib.Path),
    help="A hub folder of a Llama, Mistral or Qwen2.",
)
@click.option(
    "--vision",
    required=True,
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=pathlib.Path),
    help="A hub folder of a CLIP.",
)
@click.option(
    "--chat-template",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path),
    help="A chat template, in Jinja.  [default: the text model's, taught to read images]",
)
def assemble_checkpoint(
    destination: pathlib.Path, text: pathlib.Path, vision: pathlib.Path, chat_template: pathlib.Path | None
) -> None:
    """Make a FocusLLaVA checkpoint DST of a plain language model and a plain CLIP, for training to begin with.

    Projector and vision-guided sampler are new. Before DST appears it answers two tokens about an image.
    """
    from cluster.dry_run import dry_run
    from services.checkpoint.assemble import assemble

    template = chat_template.read_text("utf8") if chat_template else None
    with _Percent("assembling") as percent:
        click.echo(assemble(text, vision, destination, template=template, progress=percent, dry_run=dry_run))


@click.command("export")
@click.argument("source", metavar="SRC", type=click.Path(exists=True, file_okay=False, path_type=pathlib.Path))
@click.argument("destination", metavar="DST", type=click.Path(file_okay=False, path_type=pathlib.Path))
@click.option("--format", "form", type=click.Choice(["llava-next"]), required=True, help="What DST is to be.")
def export_checkpoint(source: pathlib.Path, destination: pathlib.Path, form: str) -> None:
    """Turn a FocusLLaVA checkpoint SRC into a hub-format LLaVA-NeXT folder DST, without the samplers.

    transformers' LlavaNextForConditionalGeneration reads DST, and `focusllava import` turns it back.
    """
    from services.checkpoint.export_llava_next import export_llava_next

    with _Percent("exporting") as percent:
        click.echo(export_llava_next(source, destination, progress=percent))


class _Percent:
    """Progress on standard error: one line, rewritten; nothing where nobody watches."""

    def __init__(self, what: str):
        self._what = what
        self._shown = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._shown >= 0:
            click.echo(err=True)

    def __call__(self, done: int, total: int) -> None:
        percent = 100 * done // max(total, 1)
        if percent != self._shown and sys.stderr.isatty():
            self._shown = percent
            click.echo(f"\r{self._what} {percent} %", nl=False, err=True)
