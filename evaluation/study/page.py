"""The study's page, from whatever results there are: what they say of the paper, tables, figures."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

from evaluation.focus_maps.focus import FocusModel
from evaluation.scenes import POSTER_KINDS
from evaluation.study.document import Block, Bullets, Heading, Image, Paragraph, Table, to_html, to_markdown
from evaluation.study.figures import (
    balance_history,
    branch_shares,
    by_layer,
    load_image,
    save_image,
    score_by_tokens,
)
from evaluation.study.floors import floors
from evaluation.study.focus_figures import FOCUS_FIGURES, focus_figure
from evaluation.study.results import Result, Spread, of_setting, spread
from evaluation.study.rows import Row, Source
from evaluation.study.rows import Table as StudyTable
from evaluation.study.settings import OURS, SETTINGS, Setting
from evaluation.study.tables import TABLES
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
ABOUT = (
    "Every setting starts from one checkpoint of a few million parameters and is fine-tuned on the same data of "
    "generated posters: large, mostly empty images with small cards, shapes, keypads, charts and tables. All train "
    "for as many steps; in Tables 11 and 12 for twice as many. A score is the share of questions answered exactly "
    "right on the test split, in percent; fine questions need a small glyph or a few pixels of a bar to be read. The "
    "paper's figures come from an 8B model on public benchmarks, so that only the direction of a difference can be "
    "compared, never its size."
)
NAMES = (
    "The vision-guided sampler learns by our counterfactual gate and sees the region itself, unless a row says "
    "otherwise; Table 9 compares gates and inputs. The text-guided sampler is trained at a layer and a threshold "
    "drawn for each step, beside the other one at a fixed layer; Table 6 compares."
)
COLUMNS = (
    "Columns: those of the paper have its own figures. Ours: visual tokens out of the feature map (map), that enter "
    "the language model (entering), that are left in its last layer (kept), and averaged over its layers (converted, "
    "Sec. 4.4), each of the uncompressed ones; exact match; share of regions at each branch, finest first; "
    "milliseconds from pixels to the first answer token, taken while another run was training, and only shown where "
    "the processor is that of the table's first row: docs/performance.md measures speed."
)
ERRORS = (
    "Behind ± stands the standard error over seeds, which all answer the same images: other images move a score by up"
    " to a point. With fewer than three seeds it is at least the sampling error of the questions. A difference, taken"
    " before rounding, counts from two standard errors on; less is too close to call."
)
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
AS_PICTURES = (1, 2, 9)
"""Tables that a chart of score against tokens follows."""


def write_page(results: Sequence[Result], folder: pathlib.Path, checkpoint: pathlib.Path | None = None) -> None:
    """Writes index.html, README.md and the figures' SVG files to the folder, made when it is not there.

    Figures 4 to 10 are drawn from the checkpoint; without one, those that the folder already has are shown. Without
    matplotlib the page has no new figures and says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    blocks = page(results, _figures(results, folder, checkpoint))
    (folder / "index.html").write_text(to_html(blocks, title=TITLE), encoding="utf8")
    (folder / "README.md").write_text(to_markdown(blocks), encoding="utf8")


def page(results: Sequence[Result], figures: dict[str, Image]) -> list[Block]:
    """The page's blocks; figures: by file name, those that there are."""
    found = findings(results)
    blocks: list[Block] = [Heading(level=1, text=TITLE), Paragraph(text=_in_short(results))]
    blocks += _on_the_paper(results, found)
    blocks.append(Heading(level=2, text="How to read this", anchor="how"))
    blocks += [Paragraph(text=text) for text in (ABOUT, NAMES, COLUMNS, ERRORS)]
    for table in TABLES.values():
        blocks.append(Heading(level=2, text=_name(table), anchor=f"table-{table.number}"))
        blocks += [Paragraph(text=table.compared), _table(results, table)]
        labels = {row.setting: row.label for row in table.rows}
        blocks.append(Bullets(items=[_sentence(results, one, labels) for one in found if table.number in one.tables]))
        files = [f"table-{table.number}.svg", *(["balance.svg"] if table.number == 5 else [])]
        blocks += [figures[file] for file in files if file in figures]
    blocks.append(Heading(level=2, text="Figures", anchor="figures"))
    for number in range(2, 11):
        image = figures.get(f"figure-{number}.svg")
        missing = f"Figure {number}: {NOT_RUN}; python -m evaluation.study --figure {number}, with the extra [study]."
        blocks.append(image or Paragraph(text=missing))
    blocks += [Heading(level=2, text="Scores by kind of question", anchor="kinds"), _kinds(results)]
    blocks += [Heading(level=2, text="Floors", anchor="floors"), _floors(results)]
    return [*blocks, Heading(level=2, text="What was run", anchor="run"), Paragraph(text=_what_was_run(results))]


def _figures(results: Sequence[Result], folder: pathlib.Path, checkpoint: pathlib.Path | None) -> dict[str, Image]:
    """Figures by file name; new ones are written to the folder, and no older one is shown beside newer results."""
    kept = [] if checkpoint else [load_image(folder / f"figure-{number}.svg") for number in FOCUS_FIGURES]
    try:
        drawn = [by_layer(results), branch_shares(results), balance_history(results)]
        drawn += [score_by_tokens(results, number) for number in AS_PICTURES]
        if checkpoint:
            model = FocusModel.from_checkpoint(checkpoint)
            drawn += [focus_figure(number, model) for number in FOCUS_FIGURES]
    except InvalidInput as error:
        if error.field != "matplotlib":
            raise
        drawn = []
    for image in drawn:
        if image:
            save_image(folder, image)
    return {image.file: image for image in (*kept, *drawn) if image}


def _in_short(results: Sequence[Result]) -> str:
    if not results:
        return (
            "Nothing has been run yet, so every figure of ours says so. python -m evaluation.study --all "
            "--budget-minutes 180 runs what fits and writes this page anew."
        )
    possible = [name for name, setting in SETTINGS.items() if not setting.unavailable]
    told = (
        "The paper's method and its rivals on a model of a few million parameters and generated posters, so that "
        "every table can be made again on two cores: python -m evaluation.study --table 9. "
        f"{len({result.setting for result in results} & set(possible))} of {len(possible)} settings have run."
    )
    mixed = [name for name in ("data", "start") if len({getattr(result, name) for result in results}) > 1]
    return f"{told} Beware: the runs differ in {' and '.join(mixed)}, so they do not compare." if mixed else told


def _what_was_run(results: Sequence[Result]) -> str:
    runs: dict[tuple[str, int], float] = {}
    for result in results:
        run = result.setting, result.seed
        # One training may be scored on two splits.
        runs[run] = max(runs.get(run, 0.0), result.minutes)
    facts = {
        name: _distinct(results, name) for name in ("commit", "hardware", "dtype", "data", "start", "steps", "images")
    }
    return (
        f"{_count(len(runs), 'run')} of {_count(len({setting for setting, _ in runs}), 'setting')}, "
        f"seeds {_distinct(results, 'seed')}; {facts['steps']} training steps in {facts['dtype']}, "
        f"{facts['images']} images scored; "
        f"{sum(runs.values()):.0f} minutes, summed over the runs; commit {facts['commit']}; {facts['hardware']}; "
        f"data version {facts['data']}; start {facts['start']}."
    )


def _on_the_paper(results: Sequence[Result], found: Iterable[Finding]) -> list[Block]:
    papers = [one for one in found if one.claim.source == "paper"]
    by_outcome = {outcome: [one for one in papers if one.outcome == outcome] for outcome in OUTCOMES}
    counts = ", ".join(f"{len(ones)} {outcome}" for outcome, ones in by_outcome.items())
    blocks: list[Block] = [
        Heading(level=2, text="Where our results agree and disagree with the paper", anchor="paper"),
        Paragraph(text=f"Of {_count(len(papers), 'direction')} that the paper reports: {counts}."),
    ]
    for outcome, ones in by_outcome.items():
        if ones:
            said = Bullets(items=[_sentence(results, one) for one in ones])
            blocks += [Heading(level=3, text=OUTCOMES[outcome]), said]
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


def _floors(results: Sequence[Result]) -> Table:
    words = {True: "met", False: "missed", None: "open"}
    return Table(
        caption="The least that the study set out to reach. Open: too little was run to say. The shipped model's are "
        "in its model card.",
        header=("what", "floor", "found", "verdict"),
        rows=[(one.what, one.floor, one.found, words[one.met]) for one in floors(results)],
    )


def _table(results: Sequence[Result], table: StudyTable) -> Table:
    rows = [_cells(results, table, row) for row in table.rows]
    ours = ("map, %", "entering, %", "kept, %", "converted, %", *GROUPS, "branches, %", "ms", "seeds")
    return Table(
        caption="",
        header=("setting", *(f"paper: {column}" for column in table.columns), *ours),
        rows=rows,
        strong=frozenset(number for number, row in enumerate(table.rows) if row.setting == OURS),
    )


def _cells(results: Sequence[Result], table: StudyTable, row: Row) -> list[str]:
    setting, runs = SETTINGS[row.setting], of_setting(results, row.setting)
    name = row.label if row.label in setting.title else f"{row.label} ({setting.title})"
    papers = [f"{row.paper[column]:g}" if column in row.paper else "" for column in table.columns]
    if not runs:
        why = f"cannot run: {setting.unavailable}" if setting.unavailable else NOT_RUN
        return [name, *papers, *[why if column == 0 else "" for column in range(len(GROUPS) + 7)]]
    tokens = [
        f"{spread([getattr(run, share) for run in runs]).mean:.1f}"
        for share in ("map_percent", "sampled_percent", "kept_percent", "converted_percent")
    ]
    scores = [_figure(score(results, row.setting, group)) for group in GROUPS]
    beside = {run.hardware for run in of_setting(results, table.rows[0].setting)}
    times = [run.question_ms for run in runs if run.question_ms is not None and run.hardware in beside]
    ms = f"{spread(times).mean:.1f}" if times else ""
    return [name, *papers, *tokens, *scores, _branches(setting, runs), ms, str(len(runs))]


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


def _kinds(results: Sequence[Result]) -> Block:
    rows = []
    for name, setting in SETTINGS.items():
        if of_setting(results, name):
            rows.append([setting.title, *(_figure(score(results, name, kind)) for kind in POSTER_KINDS)])
    if not rows:
        return Paragraph(text=f"{NOT_RUN.capitalize()}.")
    return Table(caption="Exact match in percent.", header=("setting", *POSTER_KINDS), rows=rows)


def _figure(found: Spread | None) -> str:
    if found is None:
        return ""
    return f"{found.mean:.1f}" + (f" ± {found.standard_error:.1f}" if found.standard_error is not None else "")


def _name(table: StudyTable) -> str:
    return f"Table {table.number}. {table.title}"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _distinct(results: Iterable[Result], name: str) -> str:
    return ", ".join(_short(str(value)) for value in sorted({getattr(result, name) for result in results}))


def _short(value: str) -> str:
    """Twelve digits of a hash, and whether the working tree differed; anything else as it is."""
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]+(\+?)$", r"\1\2", value)
