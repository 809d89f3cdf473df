"""The command `focusllava explain`: what both samplers chose for an image and a question, drawn over the image."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import click

from focusllava.messages import ImageSource, SamplerSettings, read_image
from focusllava.options import no_file, setting_options


@click.command()
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=click.Path(allow_dash=True))
@click.argument("question", callback=no_file)
@click.option(
    "--checkpoint",
    type=click.Path(file_okay=False),
    help="Folder; default: FOCUSLLAVA_CHECKPOINT, then the shipped one, which is in the source tree alone.",
)
@click.option(
    "--output",
    "-o",
    type=click.Path(dir_okay=False, path_type=pathlib.Path),
    default="focus.png",
    show_default=True,
    help="The drawing (.png); the numbers go beside it (.json). Both are overwritten.",
)
@setting_options(SamplerSettings)
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True, help="Most tokens to generate.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def explain(
    images: tuple[str, ...],
    question: str,
    checkpoint: str | None,
    output: pathlib.Path,
    max_tokens: int,
    as_json: bool,
    **samplers: Any,
) -> None:
    """Draw which visual tokens of IMAGE were chosen to answer QUESTION: scale map, kept tokens, importance by layer.

    Needs no server: both stages of the checkpoint run in this process (the [serve] extra). IMAGE "-" is standard input.
    """
    from evaluation.focus_maps.report import explain as draw

    sources: list[ImageSource] = [sys.stdin.buffer if image == "-" else image for image in images]
    files = [(name, read_image(source)) for name, source in zip(images, sources, strict=True)]
    report = draw(checkpoint, files, question, output, max_tokens=max_tokens, **samplers)
    summary: dict[str, Any] = {
        "text": report["answer"],
        "visual_tokens": report["visual_tokens"],
        "branch_shares": [(image["regions"] or {}).get("branch_shares") for image in report["images"]],
        "png": str(output),
        "json": str(output.with_suffix(".json")),
    }
    if as_json:
        click.echo(json.dumps(summary, ensure_ascii=False))
    else:
        tokens = report["visual_tokens"]
        click.echo(report["answer"])
        click.echo(
            f"visual tokens: {tokens['uncompressed']} uncompressed, {tokens['sampled']} after the vision-guided "
            f"sampler, {tokens['kept']} kept for this question\nwrote {summary['png']} and {summary['json']}",
            err=True,
        )
