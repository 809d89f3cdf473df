"""The command `focusllava data`. It imports what it needs when it runs: `focusllava --help` loads this module."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from training.data.check import Report


@click.group()
def data() -> None:
    """Look at training data."""


@data.command()
@click.argument("source", metavar="PATH|MIXTURE")
@click.option("--root", default="", metavar="FOLDER", help="Where a mixture's paths begin.  [default: as it says]")
@click.option("--images", default="", metavar="FOLDER", help="Where images' paths begin.  [default: the file's folder]")
@click.option("--stage", type=click.Choice(["pretrain", "finetune"]), help="Of a mixture, the sources of one stage.")
@click.option("--checkpoint", metavar="FOLDER", help="Count the tokens of this checkpoint too, and what would be cut.")
@click.option("--max-length", type=click.IntRange(1), metavar="N", help="Tokens of a sequence, visual ones counted.")
@click.option("--processes", type=click.IntRange(0), help="Processes that read.  [default: one a core]")
def check(
    source: str,
    root: str,
    images: str,
    stage: str | None,
    checkpoint: str | None,
    max_length: int | None,
    processes: int | None,
) -> int:
    """Read all of a data file (.json, .jsonl, .parquet, .tar), folder, glob, or mixture (.yaml).

    Prints every entry that training would leave out, with its file and line, then counts and histograms. Exit code 1 if
    there is one.
    """
    from training.data.check import check as run
    from training.data.mixture import load_mixture

    mixture = load_mixture(source, root=root, images=images, stage=stage)  # type: ignore[arg-type]
    progress = _Progress() if sys.stderr.isatty() else None
    report, limit = run(mixture, checkpoint, max_length=max_length, processes=processes, progress=progress)
    if progress:
        click.echo("\r" + " " * _Progress.WIDTH + "\r", err=True, nl=False)
    for line in report.lines(limit):
        click.echo(line)
    return 1 if report.faults else 0


class _Progress:
    """A line on the terminal, written anew ten times a second at most."""

    WIDTH = 79

    def __init__(self) -> None:
        self.began = self.written = time.monotonic()

    def __call__(self, report: Report, entries: int) -> None:
        now = time.monotonic()
        if now - self.written < 0.1:
            return
        self.written = now
        left = (now - self.began) * (entries - report.entries) / max(1, report.entries)
        line = f"{report.entries:,} of {entries:,} entries, {len(report.faults):,} faults, {_duration(left)} left"
        click.echo(f"\r{line:<{self.WIDTH}}", err=True, nl=False)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"
