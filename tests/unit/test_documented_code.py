"""The Python of the documentation that needs no server runs as it is written, on the shipped model."""

from __future__ import annotations

import json
import pathlib
import re

import pytest
from PIL import Image

from tests.documented import ROOT, python_blocks, workplace


def run(page: str, monkeypatch: pytest.MonkeyPatch, *, blocks: int = 1, telling: str = "") -> dict:
    """The names that the page's blocks define, of those alone that hold `telling`."""
    monkeypatch.chdir(ROOT)
    chosen = [block for block in python_blocks(page) if telling in block]
    assert len(chosen) == blocks
    found: dict = {}
    for block in chosen:
        exec(compile(block, page, "exec"), found)
    return found


def test_the_page_of_the_model_in_transformers_answers_as_it_stands(monkeypatch, capsys):
    found = run("docs/transformers.md", monkeypatch)
    assert re.search(r"\d\d", capsys.readouterr().out)
    answered = found["model"].generate(
        **found["inputs"], max_new_tokens=4, vision_sampler=False, text_sampler=False, do_sample=False
    )
    assert answered.shape[1] > found["inputs"]["input_ids"].shape[1]


def test_the_overview_asks_a_local_model(monkeypatch, capsys):
    found = run("README.md", monkeypatch, telling="LocalModel")
    assert capsys.readouterr().out.startswith(" 60 53")
    assert len(found["answers"]) == 2
    found["model"].close()


def test_maps_are_drawn_as_a_library(monkeypatch):
    found = run("docs/evaluation.md", monkeypatch, telling="FocusModel")
    assert (found["red"].answer, found["hen"].answer) == ("60", "hen")


def test_the_notebook_draws_a_focus_map(monkeypatch, tmp_path: pathlib.Path):
    monkeypatch.chdir(workplace(tmp_path))
    cells = json.loads((ROOT / "examples" / "focus_map.ipynb").read_text("utf8"))["cells"]
    found: dict = {}
    shown = []
    for cell in cells:
        if cell["cell_type"] == "code":
            *lines, last = "".join(cell["source"]).split("\n")
            exec("\n".join(lines), found)
            shown.append(eval(last, found) if "=" not in last.split("(")[0] else exec(last, found))
    assert shown[1] == [(" 60", 464, 53), (" hen", 464, 30)]
    sheets = [one for one in shown if isinstance(one, Image.Image)]
    assert len(sheets) == 2 and sheets[0].tobytes() != sheets[1].tobytes()
    stored = [output for cell in cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output["data"] for output in stored) == 2, "its pictures are stored with it"
