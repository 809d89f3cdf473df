"""The study's page: figures found again in HTML and Markdown, charts as SVG."""

from __future__ import annotations

import pathlib
import re
import shutil
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from evaluation.focus_maps.focus import FocusModel
from evaluation.study.document import bullets, heading, plain, table, to_html
from evaluation.study.figures import branch_shares, by_layer, drawn, load_image, save_image
from evaluation.study.focus_figures import focus_figure
from evaluation.study.page import write_page
from evaluation.study.results import Result, load_results
from evaluation.study.settings import SETTINGS
from evaluation.study.tables import TABLES
from services.common.errors import InvalidInput
from tests.study_results import result, seeds, selector

SHIPPED = pathlib.Path(__file__).parents[3] / "checkpoints" / "focusllava-tiny"
DOCS = pathlib.Path(__file__).parents[3] / "docs" / "study"
SVG = "{http://www.w3.org/2000/svg}"


def written(tmp_path: pathlib.Path, results: list[Result]) -> tuple[str, str]:
    write_page(results, tmp_path)
    return (tmp_path / "index.html").read_text("utf8"), (tmp_path / "README.md").read_text("utf8")


class Checked(HTMLParser):
    """Fails where tags do not nest; collects images, rows and everything that would be loaded."""

    VOID = {"meta", "img", "br", "link", "hr", "input"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loaded += [value for name in ("src", "href") if (value := given.get(name))]
        self.ids += [value for name, value in attrs if name == "id" and value]
        assert tag != "script"
        if tag == "img":
            self.images.append(given)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def markdown_row(text: str, start: str) -> list[str]:
    """Cells of the first table row whose name starts so, without emphasis."""
    line = next(line for line in text.splitlines() if line.lstrip("|* ").startswith(start) and line.startswith("|"))
    return [cell.strip().strip("*") for cell in line.strip("|").split(" | ")]


def test_figures_of_the_runs_stand_in_both_pages(tmp_path: pathlib.Path) -> None:
    results = [*seeds("both", 81.0, 82.0, 83.0), *seeds("off", 80.5, converted_percent=100.0)]
    html, markdown = written(tmp_path, results)
    # Mean of three, its standard error, the paper's GQA beside it.
    row = next(row for row in Checked(html).rows if row[0].startswith("Both"))
    assert row[row.index("62.6") + 1 :][:7] == [
        "23.4",
        "41.3",
        "29.7",
        "33.9",
        "82.0 ± 0.6",
        "82.0 ± 0.6",
        "82.0 ± 0.6",
    ]
    assert row[-1] == "3"
    assert markdown_row(markdown, "Both") == row
    for text in (html, markdown):
        assert f"2 of {len(SETTINGS)} settings have run" in text[: text.index("Table 1. ")]
        for fact in ("4 runs of 2 settings", "seeds 0, 1, 2", "321 training steps", "77 images", "12 minutes",
                     "commit 0123456789ab+", "a processor, 2 cores", "fedcba987654", "c0ffeec0ffee"):  # fmt: skip
            assert fact in text[text.index("What was run") :].replace("\\", ""), fact


def test_what_was_not_run_has_no_figure(tmp_path: pathlib.Path) -> None:
    html, markdown = written(tmp_path, [])
    page = Checked(html)
    assert "Nothing has been run yet" in html and "Nothing has been run yet" in markdown
    assert not page.images and not list(tmp_path.glob("*.svg"))
    names = {row.label: row for table in TABLES.values() for row in table.rows}
    shown = [row for row in page.rows if any(row[0].startswith(name) for name in names)]
    assert len(shown) >= sum(len(table.rows) for table in TABLES.values())
    for row in shown:
        # The paper's figures end where ours would begin; nothing after it is a number.
        ours = row[next(n for n, cell in enumerate(row) if re.match("not run|cannot run", cell)) + 1 :]
        assert ours and not any(ours), row
    assert all(f"Figure {number}: not run" in html for number in range(2, 11))
    assert not re.search(r"\bnan\b", html)
    trim = markdown_row(markdown, "TRIM")
    assert any("no text tower" in cell for cell in trim)


def test_a_disagreement_is_said_in_the_first_lines(tmp_path: pathlib.Path) -> None:
    results = [*seeds("both", 70.0, 70.5, 71.0), *seeds("off", 80.0, 80.5, 81.0), *seeds("vision", 60.0, 60.5, 61.0)]
    html, markdown = written(tmp_path, results)
    for text in (html, markdown):
        first = text.index("Disagree with the paper")
        assert first < text.index("Agree with the paper") < text.index("Table 1. ")
        said = text[first : text.index("Agree with the paper")]
        assert "“both samplers” 10.0 ± 0.4 points below “no sampler” on all questions: 70.5 against 80.5 %" in said
        assert "(3 seeds); the paper has it above; Tables 1, 2." in said
        assert "“both samplers” 10.0 ± 0.4 points above “vision-guided sampler”" in text[text.index("Agree with") :]


def test_a_comparison_says_what_else_differs(tmp_path: pathlib.Path) -> None:
    results = [result("both", 70.0, dtype="float32"), result("off", 80.0, converted_percent=100.0)]
    _, markdown = written(tmp_path, results)
    apart = "70.0 against 80.0 %, on 34 against 100 % of the tokens, trained in float32 against bfloat16 (1 seed)"
    assert apart in markdown
    _, markdown = written(tmp_path, [result("both", 70.0), result("off", 80.0, converted_percent=35.0)])
    assert "70.0 against 80.0 % (1 seed)" in markdown


def test_times_of_another_processor_are_not_shown(tmp_path: pathlib.Path) -> None:
    results = [result("off", 80.0, question_ms=961.2), result("both", 80.0, question_ms=962.3, hardware="another")]
    html, _ = written(tmp_path, [*results, result("vision", 80.0, question_ms=963.4)])
    assert "961.2" in html and "963.4" in html and "962.3" not in html


def test_collapse_is_named_in_table_5_and_in_the_chart(tmp_path: pathlib.Path) -> None:
    results = [selector("balance_none", 50.0, seed, [0.0, 0.01, 0.99]) for seed in range(2)]
    results += [selector("balance_0.1", 60.0), result("uniform_branches", 50.0, branch_shares={"all": [0.0, 1.0, 0.0]})]
    html, markdown = written(tmp_path, results)
    assert any("collapsed to 4x4 in 2 of 2" in cell for cell in markdown_row(markdown, "w/o"))
    assert not any("collapsed" in cell for cell in markdown_row(markdown, "weight 0.1"))
    # A control that is told to use one branch has not collapsed.
    assert not any("collapsed" in cell for cell in markdown_row(markdown, "every region at 2x2"))
    chart = load_image(tmp_path / "balance.svg")
    assert chart is not None and "weight 0, seed 1: collapsed, ends at 0 % / 1 % / 99 %" in chart.alt
    assert "weight 0.1, seed 0, ends at 17 % / 20 % / 63 %" in chart.alt


def layers() -> list[Result]:
    runs = [run for layer in (1, 2, 4, 5) for run in seeds(f"text_layer_{layer}", 60.0 + layer, 61.0 + layer)]
    return [*runs, *seeds("text", 66.5, 67.0, question_ms=8.0), result("off", 65.0)]


def test_result_figures_are_svg_and_the_same_twice(tmp_path: pathlib.Path) -> None:
    results = [*layers(), *(selector("vision", 70.0 + seed, seed) for seed in range(3))]
    expected = {2: {"exact match, %", "questions/s", "layer", "fine"}, 3: {"regions, %", "91", "4x4", "empty"}}
    for number, draw in ((2, by_layer), (3, branch_shares)):
        image = draw(results)
        assert image is not None and image == draw(results)
        save_image(tmp_path, image)
        file = (tmp_path / f"figure-{number}.svg").read_bytes()
        root = ElementTree.fromstring(file)
        assert root.tag == f"{SVG}svg" and root.findtext(f"{SVG}title") and root.findtext(f"{SVG}desc")
        assert b"#010203" not in file and b"currentColor" in file and b"prefers-color-scheme" in file
        texts = {"".join(text.itertext()) for text in root.iter(f"{SVG}text")}
        assert expected[number] <= texts
    image = load_image(tmp_path / "figure-2.svg")
    assert image is not None and "layer 3: fine 66.8, coarse 66.8, tokens 33.9 %" in image.alt


def test_without_results_nothing_is_drawn_and_a_foreign_file_is_refused(tmp_path: pathlib.Path) -> None:
    assert by_layer([]) is None and branch_shares([]) is None and drawn([]) == []
    (tmp_path / "figure-4.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>", "utf8")
    with pytest.raises(InvalidInput, match="no title"):
        write_page([], tmp_path)


def test_two_questions_on_one_image_drawn_from_a_checkpoint(tmp_path: pathlib.Path) -> None:
    model = FocusModel(SHIPPED)
    drawn_image = focus_figure(9, model)
    save_image(tmp_path, drawn_image)
    root = ElementTree.fromstring((tmp_path / "figure-9.svg").read_bytes())
    # Two posters, each with its picture and what is kept for two questions.
    assert len(list(root.iter(f"{SVG}image"))) == 6
    assert focus_figure(9, model) == drawn_image
    # The page shows it from then on, and still says of the others that they were not drawn.
    html, markdown = written(tmp_path, [])
    (image,) = Checked(html).images
    assert "two questions" in str(image["alt"])
    assert "](figure-9.svg)" in markdown and "Figure 8: not run" in html


def test_the_page_stands_alone_and_its_pictures_have_words(tmp_path: pathlib.Path) -> None:
    results = [*layers(), selector("vision", 70.0), selector("balance_none", 50.0, end=[0.0, 0.0, 1.0])]
    html, markdown = written(tmp_path, results)
    page = Checked(html)
    assert len(page.images) == 6
    for image in page.images:
        assert image["alt"] and len(image["alt"]) > 20
        assert str(image["src"]).startswith("data:image/svg+xml;base64,")
    assert all(value.startswith(("data:", "#")) for value in page.loaded)
    assert len(set(page.ids)) == len(page.ids)
    assert 'name="viewport"' in html and "prefers-color-scheme:dark" in html
    for alt, file in re.findall(r"!\[(.*?)\]\((.*?)\)", markdown):
        assert alt and (tmp_path / file).is_file()
    assert {name.removesuffix(".svg") for name in re.findall(r"\]\((\S+)\)", markdown)} == {
        "figure-2", "figure-3", "balance", "table-1", "table-2", "table-9",
    }  # fmt: skip
    write_page(results, tmp_path)
    assert (tmp_path / "index.html").read_text("utf8") == html


def test_the_page_in_docs_is_what_its_results_say(tmp_path: pathlib.Path) -> None:
    shutil.copytree(DOCS, tmp_path / "study")
    write_page(load_results(tmp_path / "study"), tmp_path / "study")
    assert (tmp_path / "study" / "README.md").read_text("utf8") == (DOCS / "README.md").read_text("utf8")


def test_no_older_chart_stands_beside_newer_results(tmp_path: pathlib.Path) -> None:
    written(tmp_path, layers())
    html, _ = written(tmp_path, [])
    assert not Checked(html).images


def test_without_matplotlib_the_tables_are_written(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    html, _ = written(tmp_path, layers())
    assert not Checked(html).images and "66.8 ± " in html
    with pytest.raises(InvalidInput, match="pip install '\\.\\[study\\]'"):
        by_layer(layers())


def test_runs_on_other_data_are_pointed_out(tmp_path: pathlib.Path) -> None:
    html, _ = written(tmp_path, [result("off", 80.0), result("both", 80.0, data="another")])
    assert "the runs differ in data" in html
    html, _ = written(tmp_path, [result("off", 80.0), result("both", 80.0)])
    assert "the runs differ" not in html


def test_text_is_text_in_both_renderings_and_a_cell_names_its_row() -> None:
    markdown = "\n\n".join((
        heading(1, "a <b> & c"), plain("*d* [e](f)"), bullets(["g|h"]), table(("j", "k"), [("l|m", "<n>")], {0}),
    ))  # fmt: skip
    html = to_html(markdown, {}, title="t</title>")
    assert Checked(html).rows == [["j", "k"], ["l|m", "<n>"]]
    assert '<th scope="row"><strong>l|m</strong></th>' in html and '<th scope="col">j</th>' in html
    assert "<b>" not in html and "t</title></title>" not in html
    assert "\\*d\\* \\[e\\](f)" in markdown and "| **l\\|m** | **\\<n\\>** |" in markdown


def test_every_setting_of_the_tables_has_a_title() -> None:
    assert {name for one in TABLES.values() for name in one.settings} <= SETTINGS.keys()
