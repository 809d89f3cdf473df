"""The command `focusllava serve`: both stages and the gateway on this machine, until a signal or Ray's own end."""

from __future__ import annotations

import contextlib
import time

import click

from focusllava.extras import find_checkpoint, part

POLL_S = 5.0


@click.command()
@click.argument("checkpoint", required=False, type=click.Path(file_okay=False))
@click.option("--host", default="127.0.0.1", show_default=True, help="Where both APIs listen; 0.0.0.0: everywhere.")
@click.option("--grpc-port", type=click.IntRange(0, 65535), default=9000, show_default=True, help="0: a free one.")
@click.option("--http-port", type=click.IntRange(0, 65535), default=0, help="Of OpenAI's API; 0: 8000, or a free one.")
def serve(checkpoint: str | None, host: str, grpc_port: int, http_port: int) -> None:
    """Serve CHECKPOINT on this machine until Ctrl-C.

    Default: FOCUSLLAVA_CHECKPOINT, then the shipped one, which is in the source tree and not in an installed package.
    """
    local, interrupts = part("cluster.local", "serve"), part("cluster.interrupts", "serve")
    try:
        with (
            interrupts.signals_interrupt(),
            local.LocalCluster(
                checkpoint=find_checkpoint(checkpoint), host=host, grpc_port=grpc_port, http_port=http_port
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
