"""`focusllava data check` names every entry that training would leave out, and counts what there is."""

import json
from collections import Counter

import pytest
from PIL import Image

from services.common.errors import InvalidInput
from tests.tiny_checkpoints import make_random_checkpoint
from training.data.check import histogram, percentile, spread
from training.data.command import data


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    make_random_checkpoint(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    Image.new("RGB", (30, 90)).save(tmp_path / "b.png")
    entries = [
        {"image": "a.png", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "It."}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}] * 3},
        {"image": ["a.png", "b.png"],
         "conversations": [{"from": "human", "value": "<image> <image>?"}, {"from": "gpt", "value": "word " * 150}]},
    ]  # fmt: skip
    (tmp_path / "good.json").write_text(json.dumps(entries, indent=1))
    return tmp_path


def check(*arguments):
    """Exit code, as the command line gets it."""
    return data.main(["check", *map(str, arguments), "--processes", "0"], standalone_mode=False)


def test_good_data_is_counted(folder, checkpoint, capsys):
    assert check(folder / "good.json", "--checkpoint", checkpoint, "--max-length", "300") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "entries 3 without image 1 of one image 1 of several images 1" in printed
    assert (
        "answers 5 (of an entry: least 1, median 1, 99 % 3, most 3) images 3 faults 0 cut at 300 tokens: 1 entries"
        in printed
    )
    assert "longest side of an image, in pixels (least 60, median 60, 99 % 90, most 90) to 64 2" in printed
    with pytest.raises(InvalidInput, match="none.json is no file"):
        check(folder / "none.json")


def test_faults_are_named_with_their_lines(folder, checkpoint, capsys):
    lines = [json.dumps(entry) for entry in json.loads((folder / "good.json").read_text())]
    lines.insert(
        1, '{"image": "none.png", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}'
    )
    lines.append("[1")
    (folder / "bad.jsonl").write_text("\n".join(lines))
    assert check(folder / "bad.jsonl") == 1
    printed = capsys.readouterr().out
    assert f"{folder}/bad.jsonl[1], line 2: missing_image: {folder}/none.png: No such file or directory\n" in printed
    assert f"{folder}/bad.jsonl[4], line 5: malformed: is not JSON" in printed
    assert "tokens of a sequence" not in printed
    assert check(folder / "bad.jsonl", "--checkpoint", checkpoint, "--max-length", "100") == 1
    printed = capsys.readouterr().out
    assert f"{folder}/bad.jsonl[3], line 4: too_long: " in printed and "faults 3" in " ".join(printed.split())


def test_percentiles_and_bars():
    counts = Counter({1: 50, 10: 49, 1000: 1})
    assert [percentile(counts, share) for share in (0, 0.5, 0.51, 0.99, 1)] == [1, 1, 10, 10, 1000]
    assert spread(Counter()) == "none"
    lines = list(histogram(counts))
    assert (
        len(lines) == 19
        and lines[0].split() == ["to", "2", "50", "#" * 40]
        and lines[-1].split() == ["to", "1,024", "1", "#"]
    )
