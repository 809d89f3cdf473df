"""The study's page, from whatever results there are: what they say of the paper, tables, figures."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

from evaluation.scenes import POSTER_KINDS
from evaluation.study.document import Image, bullets, heading, picture, plain, table, to_html
from evaluation.study.figures import drawn, load_image, save_image
from evaluation.study.focus_figures import FOCUS_FIGURES
from evaluation.study.results import Result, Spread, of_setting, spread
from evaluation.study.settings import OURS, SETTINGS, STUDY, Setting
from evaluation.study.tables import FIGURES, TABLES, Row, Source, Table
from evaluation.study.verdicts import (
    Finding,
    Outcome,
    branch_names,
    collapsed,
    final_shares,
    findings,
    has_selector,
    mean_of,
    score,
)
from services.common.errors import InvalidInput

TITLE = "The paper in small: FocusLLaVA's tables and figures on a model that anyone can train"
NOT_RUN = "not run"
OUTCOMES: dict[Outcome, str] = {
    "disagree": "Disagree with the paper",
    "agree": "Agree with the paper",
    "too close to call": "Too close to call",
    "not run": "Not run",
}
SAID: dict[Source, dict[Outcome, str]] = {
    "paper": {"disagree": "the paper has it above", "agree": "as in the paper"},
    "expected": {"disagree": "not as expected", "agree": "as expected"},
}
TOKENS_APART = 5.0
"""Points of converted tokens from which on a comparison says that it is not one at equal tokens."""
GROUPS = {"all": "all questions", "fine": "fine questions", "coarse": "coarse questions"}


def write_page(results: Sequence[Result], folder: pathlib.Path, checkpoint: pathlib.Path | None = None) -> None:
    """Writes index.html, README.md and the figures' SVG files to the folder, made when it is not there.

    Figures 4 to 10 are drawn from the checkpoint; without one, those that the folder already has are shown. Without
    matplotlib the page has no new figures and says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = _figures(results, folder, checkpoint)
    text = page(results, figures)
    (folder / "README.md").write_text(text, encoding="utf8")
    svgs = {file: image.svg for file, image in figures.items()}
    (folder / "index.html").write_text(to_html(text, svgs, title=TITLE), encoding="utf8")


def page(results: Sequence[Result], figures: Mapping[str, Image]) -> str:
    """The page as Markdown; figures: by file name, those that there are."""
    found = findings(results)
    blocks = [heading(1, TITLE), plain(_in_short(results)), *_on_the_paper(results, found)]
    blocks += [heading(2, "How to read this"), *map(plain, STUDY["how_to_read"])]
    for one in TABLES.values():
        labels = {row.setting: row.label for row in one.rows}
        said = [_sentence(results, claim, labels) for claim in found if one.number in claim.tables]
        blocks += [heading(2, f"Table {one.number}. {one.title}"), plain(one.compared), _table(results, one)]
        blocks.append(bullets(said))
        files = [f"table-{one.number}.svg", *(["balance.svg"] if one.number == 5 else [])]
        blocks += [picture(figures[file]) for file in files if file in figures]
    blocks.append(heading(2, "Figures"))
    for number in FIGURES:
        image = figures.get(f"figure-{number}.svg")
        missing = f"Figure {number}: {NOT_RUN}; python -m evaluation.study --figure {number}, with the extra [study]."
        blocks.append(picture(image) if image else plain(missing))
    kinds = [
        [setting.title, *(_figure(score(results, name, kind)) for kind in POSTER_KINDS)]
        for name, setting in SETTINGS.items()
        if of_setting(results, name)
    ]
    blocks += [heading(2, "Scores by kind of question"), "Exact match in percent." if kinds else "Not run."]
    blocks += [table(("setting", *POSTER_KINDS), kinds)] if kinds else []
    return "\n\n".join([*blocks, heading(2, "What was run"), plain(_what_was_run(results))]) + "\n"


def _figures(results: Sequence[Result], folder: pathlib.Path, checkpoint: pathlib.Path | None) -> dict[str, Image]:
    """Figures by file name; new ones are written to the folder, and no older one is shown beside newer results."""
    kept = [] if checkpoint else [load_image(folder / f"figure-{number}.svg") for number in FOCUS_FIGURES]
    try:
        new = drawn(results, checkpoint)
    except InvalidInput as error:
        if error.field != "matplotlib":
            raise
        new = []
    for image in new:
        save_image(folder, image)
    return {image.file: image for image in (*kept, *new) if image}


def _in_short(results: Sequence[Result]) -> str:
    if not results:
        return (
            "Nothing has been run yet, so every figure of ours says so. python -m evaluation.study --all "
            "--budget-minutes 180 runs what fits and writes this page anew."
        )
    told = (
        "The paper's method and its rivals on a model of a few million parameters and generated posters, so that "
        "every table can be made again on two cores: python -m evaluation.study --table 9. "
        f"{len({result.setting for result in results} & SETTINGS.keys())} of {len(SETTINGS)} settings have run."
    )
    mixed = [name for name in ("data", "start") if len({getattr(result, name) for result in results}) > 1]
    return f"{told} Beware: the runs differ in {' and '.join(mixed)}, so they do not compare." if mixed else told


def _what_was_run(results: Sequence[Result]) -> str:
    runs: dict[tuple[str, int], float] = {}
    for result in results:
        run = result.setting, result.seed
        # One training may be scored on two splits.
        runs[run] = max(runs.get(run, 0.0), result.minutes)
    names = ("commit", "hardware", "dtype", "data", "start", "steps", "images")
    facts = {name: _distinct(results, name) for name in names}
    return (
        f"{_count(len(runs), 'run')} of {_count(len({setting for setting, _ in runs}), 'setting')}, "
        f"seeds {_distinct(results, 'seed')}; {facts['steps']} training steps in {facts['dtype']}, "
        f"{facts['images']} images scored; "
        f"{sum(runs.values()):.0f} minutes, summed over the runs; commit {facts['commit']}; {facts['hardware']}; "
        f"data version {facts['data']}; start {facts['start']}."
    )


def _on_the_paper(results: Sequence[Result], found: Iterable[Finding]) -> list[str]:
    papers = [one for one in found if one.claim.source == "paper"]
    by_outcome = {outcome: [one for one in papers if one.outcome == outcome] for outcome in OUTCOMES}
    counts = ", ".join(f"{len(ones)} {outcome}" for outcome, ones in by_outcome.items())
    blocks = [heading(2, "Where our results agree and disagree with the paper")]
    blocks.append(f"Of {_count(len(papers), 'direction')} that the paper reports: {counts}.")
    for outcome, ones in by_outcome.items():
        if ones:
            blocks += [heading(3, OUTCOMES[outcome]), bullets([_sentence(results, one) for one in ones])]
    return blocks


def _sentence(results: Sequence[Result], one: Finding, labels: Mapping[str, str] | None = None) -> str:
    """labels: a table's names of its settings, where the sentence stands under that table."""
    names = one.claim.better, one.claim.worse
    named = {name: SETTINGS[name].title for name in names} | dict(labels or {})
    better, worse = (f"“{named[name]}”" for name in names)
    if one.difference is None or one.error is None or not one.better or not one.worse:
        text = f"{better} above {worse} on {GROUPS[one.claim.group]}: {NOT_RUN}"
    else:
        text = (
            f"{better} {abs(one.difference):.1f} ± {one.error:.1f} points {'above' if one.difference > 0 else 'below'} "
            f"{worse} on {GROUPS[one.claim.group]}: {one.better.mean:.1f} against {one.worse.mean:.1f} %"
        )
        tokens = [mean_of(results, name, "converted_percent") for name in names]
        if abs(tokens[0] - tokens[1]) > TOKENS_APART:
            text += f", on {tokens[0]:.0f} against {tokens[1]:.0f} % of the tokens"
        dtypes = [_distinct(of_setting(results, name), "dtype") for name in names]
        if dtypes[0] != dtypes[1]:
            text += f", trained in {dtypes[0]} against {dtypes[1]}"
        text += f" ({_count(one.seeds, 'seed')}); {SAID[one.claim.source].get(one.outcome, one.outcome)}"
    if labels is None:
        text += f"; Table{'s' * (len(one.tables) > 1)} {', '.join(map(str, one.tables))}"
    return f"{text}."


def _table(results: Sequence[Result], shown: Table) -> str:
    ours = ("map, %", "entering, %", "kept, %", "converted, %", *GROUPS, "branches, %", "ms", "seeds")
    header = ("setting", *(f"paper: {column}" for column in shown.columns), *ours)
    strong = [number for number, row in enumerate(shown.rows) if row.setting == OURS]
    return table(header, [_cells(results, shown, row) for row in shown.rows], strong)


def _cells(results: Sequence[Result], shown: Table, row: Row) -> list[str]:
    papers = [f"{row.paper[column]:g}" if column in row.paper else "" for column in shown.columns]
    runs, title = of_setting(results, row.setting), SETTINGS[row.setting].title if row.setting else row.label
    name = row.label if row.label in title else f"{row.label} ({title})"
    if not runs:
        why = f"cannot run: {row.cannot_run}" if row.cannot_run else NOT_RUN
        return [name, *papers, why, *[""] * (len(GROUPS) + 6)]
    tokens = [
        f"{spread([getattr(run, share) for run in runs]).mean:.1f}"
        for share in ("map_percent", "sampled_percent", "kept_percent", "converted_percent")
    ]
    scores = [_figure(score(results, row.setting, group)) for group in GROUPS]
    beside = {run.hardware for run in of_setting(results, shown.rows[0].setting)}
    times = [run.question_ms for run in runs if run.question_ms is not None and run.hardware in beside]
    ms = f"{spread(times).mean:.1f}" if times else ""
    return [name, *papers, *tokens, *scores, _branches(SETTINGS[row.setting], runs), ms, str(len(runs))]


def _branches(setting: Setting, runs: Sequence[Result]) -> str:
    """Mean shares, and a collapse by name."""
    shares = [final_shares(run) for run in runs if run.branch_shares]
    if not shares:
        return ""
    told = " / ".join(f"{100 * sum(column) / len(shares):.0f}" for column in zip(*shares, strict=True))
    fallen = [run for run in runs if collapsed(run)] if has_selector(setting) else []
    names = branch_names(setting)
    to = {names[max(range(len(ends)), key=ends.__getitem__)] for ends in map(final_shares, fallen)}
    return f"{told}; collapsed to {' or '.join(sorted(to))} in {len(fallen)} of {len(runs)}" if fallen else told


def _figure(found: Spread | None) -> str:
    if found is None:
        return ""
    return f"{found.mean:.1f}" + (f" ± {found.standard_error:.1f}" if found.standard_error is not None else "")


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _distinct(results: Iterable[Result], name: str) -> str:
    return ", ".join(_short(str(value)) for value in sorted({getattr(result, name) for result in results}))


def _short(value: str) -> str:
    """Twelve digits of a hash, and whether the working tree differed; anything else as it is."""
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]+(\+?)$", r"\1\2", value)
