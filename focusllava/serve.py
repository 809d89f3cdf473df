"""The command `focusllava serve`: both stages and the gateway on this machine, until a signal or Ray's own end."""

from __future__ import annotations

import contextlib
import signal
import time
from typing import NoReturn

import click

from focusllava.extras import find_checkpoint, part

POLL_S = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@click.command()
@click.argument("checkpoint", required=False, type=click.Path(file_okay=False))
@click.option("--grpc-port", type=click.IntRange(0, 65535), default=9000, show_default=True, help="0: a free one.")
def serve(checkpoint: str | None, grpc_port: int) -> None:
    """Serve CHECKPOINT on this machine until Ctrl-C.

    Default: FOCUSLLAVA_CHECKPOINT, then the shipped one, which is in the source tree and not in an installed package.
    """
    local = part("cluster.local", "serve")
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup asks for what it says
            signal.signal(number, _interrupt_once)
    try:
        with local.LocalCluster(checkpoint=find_checkpoint(checkpoint), grpc_port=grpc_port) as cluster:
            cluster.start(click.echo)
            click.echo(f"dashboard {cluster.dashboard_url}, metrics {cluster.metrics_url}")
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


def _interrupt_once(*_: object) -> NoReturn:
    """As Ctrl-C, but once: a closing terminal sends SIGHUP twice, and a second interrupt would leave Ray running."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
