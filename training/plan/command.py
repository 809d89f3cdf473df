"""The command `focusllava plan`. It imports what it needs when it runs: `focusllava --help` loads this module."""

from __future__ import annotations

from typing import Any

import click

from focusllava.sizes import parse_size

GPUS = ("A100", "H100", "H200")


def _bytes(context: click.Context, parameter: click.Parameter, value: str) -> int:
    try:
        return parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


_SHARE = click.FloatRange(0, 1, min_open=True)


@click.command()
@click.option("--config", required=True, metavar="FILE", help="YAML file of the run, or the name of a shipped one.")
@click.option("--gpus", type=click.IntRange(1), default=8, show_default=True)
@click.option(
    "--gpu-memory",
    metavar="SIZE",
    default="80GB",
    show_default=True,
    callback=_bytes,
    help="Of each, as 80GB.",
)
@click.option("--gpu", type=click.Choice(GPUS), default="A100", show_default=True, help="Whose peak the hours are of.")
@click.option("--set", "changes", multiple=True, metavar="NAME=VALUE", help="Replaces one value of the configuration.")
@click.option("--model", default="", metavar="FOLDER", help="Checkpoint, or llama3-8b.  [default: init_from]")
@click.option("--samples", type=click.IntRange(1), help="Of the whole run.  [default: the run's own]")
@click.option(
    "--text-tokens", type=click.IntRange(1), default=400, show_default=True, help="Words of a sample, in the mean."
)
@click.option("--answer-tokens", type=click.IntRange(1), default=200, show_default=True, help="Those that are answers.")
@click.option("--vision-share", type=_SHARE, default=0.49, show_default=True,
              help="Visual tokens that the vision-guided sampler leaves.")  # fmt: skip
@click.option("--text-share", type=_SHARE, default=0.73, show_default=True,
              help="Those of them that go on at the text-guided sampler.")  # fmt: skip
@click.option("--utilisation", type=_SHARE, default=0.4, show_default=True, help="Share of the peak that is reached.")
def plan(config: str, model: str, changes: tuple[str, ...], **wishes: Any) -> None:
    """Print what a training run needs: memory by part for ZeRO 0 to 3, the micro-batch that fits, and hours.

    Nothing is loaded: the model's configuration is enough.
    """
    from services.common.errors import InvalidInput
    from training.config import load
    from training.plan.of_run import find_config, find_model, plan_run
    from training.plan.report import lines

    file = find_config(config)
    try:
        run = load(file, list(changes))
        found, source = find_model(model, run)
        click.echo("\n".join(lines(plan_run(run, found, **wishes), source)))
    except OSError as error:
        raise InvalidInput(f"{file}: {error.strerror}", field="--config") from None
