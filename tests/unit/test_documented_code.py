"""The Python of docs/transformers.md runs as it is written, on the shipped model."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_the_page_of_the_model_in_transformers_answers_as_it_stands(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/transformers.md").read_text("utf8"), re.DOTALL)
    found: dict = {}
    for block in blocks:
        exec(compile(block, "docs/transformers.md", "exec"), found)
    assert len(blocks) == 1 and re.search(r"\d\d", capsys.readouterr().out)
    answered = found["model"].generate(
        **found["inputs"], max_new_tokens=4, vision_sampler=False, text_sampler=False, do_sample=False
    )
    assert answered.shape[1] > found["inputs"]["input_ids"].shape[1]
