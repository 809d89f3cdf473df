"""The paper's figures 2 to 10 and two of the study's own, each an SVG file from results or from a checkpoint."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from xml.etree import ElementTree

from evaluation.focus_maps.focus import FocusModel
from evaluation.study.charts import Run, Series, described, lines, scatter, stacked_areas, stacked_bars
from evaluation.study.document import Image
from evaluation.study.focus_figures import FOCUS_FIGURES, focus_figure
from evaluation.study.results import Result, Spread, of_setting, spread
from evaluation.study.settings import SETTINGS
from evaluation.study.tables import FIGURES, TABLES
from evaluation.study.verdicts import branch_columns, branch_names, collapsed, mean_of, score
from services.common.errors import InvalidInput

SHARES_OF = "vision"
"""Figure 3's setting."""
REGION_KINDS = {
    "all": "all regions",
    "glyph": "text or bars",
    "shape": "shapes",
    "distractor": "distractors",
    "empty": "empty",
}
"""Keys of Result.branch_shares, and what the figure calls them."""
GROUPS = ("fine", "coarse")
AS_PICTURES = (1, 2, 9)
"""Tables that a chart of score against tokens follows."""
SEEDS_SHOWN = 3
SVG = "{http://www.w3.org/2000/svg}"


def drawn(results: Sequence[Result], checkpoint: pathlib.Path | None = None) -> list[Image]:
    """All figures that there are results for; those of FOCUS_FIGURES where there is a checkpoint to draw them from.

    Raises InvalidInput where matplotlib is not installed.
    """
    found = [by_layer(results), branch_shares(results), balance_history(results)]
    found += [score_by_tokens(results, number) for number in AS_PICTURES]
    if checkpoint:
        model = FocusModel(checkpoint)
        found += [focus_figure(number, model) for number in FOCUS_FIGURES]
    return [image for image in found if image]


def save_image(folder: pathlib.Path, image: Image) -> None:
    """Writes the file with its own alternative text and caption in it."""
    text = described(image.svg, title=image.alt, description=image.caption)
    (folder / image.file).write_text(text, encoding="utf8")


def load_image(path: pathlib.Path) -> Image | None:
    """What `save_image` wrote; None where there is no such file. Raises InvalidInput for a file that it did not."""
    try:
        svg = path.read_text(encoding="utf8")
        root = ElementTree.fromstring(svg)
    except FileNotFoundError:
        return None
    except ElementTree.ParseError as error:
        raise InvalidInput(f"is no SVG: {error}", field=str(path)) from None
    alt, caption = root.findtext(f"{SVG}title"), root.findtext(f"{SVG}desc")
    if alt is None or caption is None:
        raise InvalidInput("has no title or no description", field=str(path))
    return Image(file=path.name, svg=svg, alt=alt, caption=caption)


def by_layer(results: Sequence[Result]) -> Image | None:
    """Figure 2: score, tokens and time against the layer before which the text-guided sampler prunes."""
    at_layer = sorted(
        (setting.text[0], name)
        for name in FIGURES[2]
        if (setting := SETTINGS[name]).text and all(score(results, name, group) for group in GROUPS)
    )
    if not at_layer:
        return None
    layers, names = zip(*at_layer, strict=True)
    scores = [_series(group, layers, [score(results, name, group) for name in names]) for group in GROUPS]
    tokens = [mean_of(results, name, "converted_percent") for name in names]
    panels = {
        "exact match, %": scores,
        "visual tokens, converted, %": [Series(label="converted tokens", x=layers, y=tokens)],
    }
    runs = {layer: of_setting(results, name) for layer, name in at_layer}
    times = {layer: [run.question_ms for run in of_layer if run.question_ms] for layer, of_layer in runs.items()}
    speed = {layer: 1000 / spread(of_layer).mean for layer, of_layer in times.items() if of_layer}
    if speed:
        panels["questions/s"] = [Series(label="speed", x=list(speed), y=list(speed.values()))]
    off = score(results, "off", "fine")
    told = "; ".join(
        f"layer {layer}: fine {fine:.1f}, coarse {coarse:.1f}, tokens {share:.1f} %"
        for layer, fine, coarse, share in zip(layers, scores[0].y, scores[1].y, tokens, strict=True)
    )
    dotted = " Dotted: fine questions with no sampler." if off else ""
    return Image(
        file="figure-2.svg",
        svg=lines(panels, x_label="layer", reference={"exact match, %": off.mean} if off else None),
        alt=f"Exact match and visual tokens by the text-guided sampler's layer. {told}.",
        caption="Figure 2. The text-guided sampler before each layer: one model, trained with random layers, evaluated "
        f"at each. Error bars: standard error.{dotted}",
    )


def branch_shares(results: Sequence[Result]) -> Image | None:
    """Figure 3: how often each branch is chosen, by what a region shows."""
    runs = [run for run in of_setting(results, SHARES_OF) if run.branch_shares]
    if not runs:
        return None
    names, bars = branch_names(SETTINGS[SHARES_OF]), {}
    for kind, label in REGION_KINDS.items():
        of_kind = [run.branch_shares[kind] for run in runs if sum(run.branch_shares.get(kind, ()))]
        if of_kind:
            bars[label] = [sum(column) / len(of_kind) for column in zip(*of_kind, strict=True)]
    told = "; ".join(
        f"{label}: " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in zip(names, shares, strict=True))
        for label, shares in bars.items()
    )
    return Image(
        file="figure-3.svg",
        svg=stacked_bars(bars, names, x_label="regions, %"),
        alt=f"Share of regions pooled by each branch. {told}.",
        caption=f"Figure 3. Branches that the vision-guided sampler chooses, by what the region shows "
        f"({'one seed' if len(runs) == 1 else f'mean of {len(runs)} seeds'}; nobody asks about distractors).",
    )


def balance_history(results: Sequence[Result]) -> Image | None:
    """Branch shares against the training step for each weight of the balance loss, a row a weight, a column a seed."""
    rows, told = [], []
    settings = [row.setting for row in TABLES[5].rows if row.setting.startswith("balance_")]
    for setting in settings:
        row = []
        for run in of_setting(results, setting)[:SEEDS_SHOWN]:
            logged = [(line["step"], branch_columns(line)) for line in run.history if "branch_0" in line]
            if logged:
                steps, shares = zip(*logged, strict=True)
                weight = SETTINGS[setting].stage["loss"]["balance"]
                label = f"weight {weight:g}, seed {run.seed}{': collapsed' if collapsed(run) else ''}"
                row.append(Run(label=label, steps=steps, shares=shares))
                told.append(f"{label}, ends at {' / '.join(f'{100 * share:.0f} %' for share in shares[-1])}")
        if row:
            rows.append(row)
    if not rows:
        return None
    names = branch_names(SETTINGS[settings[0]])
    return Image(
        file="balance.svg",
        svg=stacked_areas(rows, names, x_label="step"),
        alt=f"Share of regions at {' / '.join(names)} over training: {'; '.join(told)}.",
        caption="Branches chosen over training, by weight of the balance loss. Collapsed: one branch for more than "
        "95 % of the regions when scored.",
    )


def score_by_tokens(results: Sequence[Result], table: int) -> Image | None:
    """Fine questions right against the tokens spent, for each setting of a table."""
    shown = []
    for row in TABLES[table].rows:
        found = score(results, row.setting, "fine")
        if found:
            shown.append(_series(row.label, [mean_of(results, row.setting, "converted_percent")], [found]))
    if not shown:
        return None
    told = "; ".join(f"{one.label}: {one.y[0]:.1f} % at {one.x[0]:.1f} %" for one in shown)
    return Image(
        file=f"table-{table}.svg",
        svg=scatter(shown, x_label="visual tokens, converted, %", y_label="fine questions, exact match, %"),
        alt=f"Fine questions right against visual tokens. {told}.",
        caption=f"Table {table} as a picture: fine questions right against converted visual tokens. Error bars: "
        "standard error.",
    )


def _series(label: str, x: Sequence[float], found: Sequence[Spread | None]) -> Series:
    """Points of what was scored; without an error where there is none."""
    points = [(at, one) for at, one in zip(x, found, strict=True) if one]
    return Series(
        label=label,
        x=[at for at, _ in points],
        y=[one.mean for _, one in points],
        error=[float("nan") if one.standard_error is None else one.standard_error for _, one in points],
    )
