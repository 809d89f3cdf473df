"""Data files of every format, read at random through their indices; a changed file is another one."""

import io
import json
import tarfile
from collections import OrderedDict

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from services.common.errors import InvalidInput
from training.data.entries import signed_words
from training.data.faults import EntryFault
from training.data.mixture import ConversationData, Mixture, SourceSettings, load_mixture
from training.data.sources import find_files, open_source, parquet, text

WORDS = 'a na\u00efve \u00e0 \u4f60\u597d \u0085 {[\\"]} word'


def entry(number, image=True):
    shown = {"image": f"{number}.png"} if image else {}
    said = ("<image>\n" if image else "") + f"{WORDS} " * (number + 1)
    return {
        "id": number,
        **shown,
        "conversations": [{"from": "human", "value": said}, {"from": "gpt", "value": f"\U0001f600 {number}"}],
    }


ENTRIES = [entry(number, number % 3 != 0) for number in range(9)]


def png(side=8):
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("chunk", [1, 7, 64, 2**22])
@pytest.mark.parametrize(
    ("indent", "ascii_only", "prefix"), [(None, True, ""), (2, False, "\ufeff \n"), (None, False, "")]
)
def test_a_list_is_read_whatever_its_pieces(tmp_path, monkeypatch, chunk, indent, ascii_only, prefix):
    monkeypatch.setattr(text, "CHUNK", chunk)
    path = tmp_path / "data.json"
    path.write_text(prefix + json.dumps([*ENTRIES, 12, None], indent=indent, ensure_ascii=ascii_only), "utf8")
    source = open_source(path)
    assert [source.entry(n) for n in (8, 0, 5)] == [ENTRIES[n] for n in (8, 0, 5)]
    assert len(source) == 11 and source.entry(9) == 12 and source.entry(10) is None
    if ascii_only:  # of other letters' bytes some are white space to Latin-1
        assert source.lengths.tolist() == [signed_words(e) for e in (*ENTRIES, 12, None)]
    assert (source.lengths[:9] < 0).tolist() == [n % 3 == 0 for n in range(9)]


def test_lines_are_entries_and_a_bad_one_is_its_own_fault(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([json.dumps(ENTRIES[0]), "", "{nonsense", json.dumps(ENTRIES[2])]), "utf8")
    source = open_source(path)
    assert len(source) == 3 and source.entry(2) == ENTRIES[2]
    assert [source.place(n) for n in (2, 0, 1)] == ["line 4", "line 1", "line 3"]
    with pytest.raises(EntryFault, match="is not JSON"):
        source.entry(1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds no entries"),
        ("", "holds no entries"),
        ('[{"a": 1}\n{"b": 2}]', "line 2: a comma or the closing bracket"),
        ('[{"a": 1},\n\n{"b": }]', "line 3: "),
        ('[{"a": 1},\n{"b": 2}', "line 2: "),
        ('[{"a": 1}] x', "something follows"),
    ],
)
def test_a_file_that_is_not_json_is_refused_with_its_line(tmp_path, content, message):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(InvalidInput, match=rf"data: .*data.json .*{message}"):
        open_source(path)


@pytest.mark.parametrize("in_struct", [True, False])
def test_parquet_has_its_images_inside(tmp_path, in_struct, monkeypatch):
    rows = []
    for n, raw in enumerate(ENTRIES):
        image = ({"bytes": png(n + 1), "path": None} if in_struct else png(n + 1)) if "image" in raw else None
        rows.append({"image": image, "conversations": raw["conversations"], "other": n})
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    source = open_source(path)
    assert source.lengths.tolist() == [signed_words(raw) for raw in ENTRIES]
    data = ConversationData(load_mixture(path))
    for n in (8, 0, 5, 4, 1):
        conversation, images = data.read(n)
        assert conversation.answers == 1 and images == ([png(n + 1)] if n % 3 else [])
    assert data.place(5) == "row group 2, row 1"
    monkeypatch.setattr(parquet, "_groups", OrderedDict())
    for kept_bytes, groups in ((2**20, 2), (0, 1)):
        monkeypatch.setattr(parquet, "KEPT_BYTES", kept_bytes)
        assert data.read(0)[1] == [] and data.read(5)[1] == [png(6)] and len(parquet._groups) == groups
        parquet._groups.clear()
    with pytest.raises(InvalidInput, match="has the columns x, expected"):
        other = tmp_path / "other.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), other)
        open_source(other)


def test_tar_samples_have_their_images_as_members(tmp_path):
    path = tmp_path / "data.tar"
    with tarfile.open(path, "w") as tar:

        def add(name, data):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))

        add("s/0.json", json.dumps(ENTRIES[0]).encode())
        add("s/1.png", png(1))
        add("s/1.json", json.dumps(ENTRIES[1]).encode())
        add("s/2.json", json.dumps({**entry(1), "image": ["x", "y"], "conversations": [
            {"from": "human", "value": "<image> <image>"}, {"from": "gpt", "value": "!"}]}).encode())  # fmt: skip
        add("s/2.1.png", png(4))
        add("s/2.0.png", png(3))
        add("s/3.jpg", png(5))
    data = ConversationData(load_mixture(path))
    assert [data.read(n)[1] for n in (2, 0, 1)] == [[png(3), png(4)], [], [png(1)]]
    assert (data.lengths > 0).tolist() == [False, True, True, True]
    with pytest.raises(EntryFault, match="has no .json member"):
        data.read(3)
    (tmp_path / "bad.tar").write_bytes(b"nothing" * 200)
    with pytest.raises(InvalidInput, match="not a plain tar file"):
        open_source(tmp_path / "bad.tar")


def test_an_index_is_made_once_and_anew_when_the_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(ENTRIES))
    first = ConversationData(load_mixture(path))
    with monkeypatch.context() as patched:
        patched.setattr(text, "_list_entries", lambda *_: pytest.fail("indexed twice"))
        again = ConversationData(load_mixture(path))
    assert again.identity() == first.identity() and np.array_equal(again.lengths, first.lengths)
    assert isinstance(open_source(path).lengths, np.memmap)
    path.write_text(json.dumps([*ENTRIES[:-1], entry(5)]))
    edited = ConversationData(load_mixture(path))
    assert edited.identity() != first.identity() and edited.read_raw(8) == entry(5)
    path.write_text(json.dumps(ENTRIES))  # another time, the same content
    assert ConversationData(load_mixture(path)).identity() == first.identity()


def test_files_are_found_by_path_folder_and_glob(tmp_path):
    for name in ("b.json", "a.jsonl", "note.txt"):
        (tmp_path / name).write_text(json.dumps(ENTRIES[0]) if name != "b.json" else json.dumps(ENTRIES))
    assert [path.name for path in find_files(tmp_path)] == ["a.jsonl", "b.json"]
    assert [path.name for path in find_files(f"{tmp_path}/*.json*")] == ["a.jsonl", "b.json"]
    data = ConversationData(load_mixture(tmp_path))
    assert len(data) == 10 and data.name(0).endswith("a.jsonl[0]") and data.name(9).endswith("b.json[8]")
    with pytest.raises(InvalidInput, match="ends with none of"):
        find_files(tmp_path / "note.txt")
    with pytest.raises(InvalidInput, match="matches none"):
        find_files(tmp_path / "*.tar")


def test_a_mixture_file_names_sources_their_stages_and_images(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.json").write_text(json.dumps(ENTRIES))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.png").write_bytes(png(2))
    file = tmp_path / "mix.yaml"
    file.write_text(
        "root: .\nsources:\n  - {name: one, path: sub/d.json, images: pictures, stage: pretrain}\n"
        "  - {name: two, path: sub/*.json, weight: 2}\n"
    )
    both = load_mixture(file)
    assert [s.name for s in both.sources] == ["one", "two"]
    assert [s.name for s in load_mixture(file, stage="finetune").sources] == ["two"]
    assert [s.name for s in load_mixture(file, root=tmp_path / "sub" / "..").sources] == ["one", "two"]
    data = ConversationData(both)
    assert data.ranges == ((0, 9), (9, 18)) and data.read(1)[1] == [png(2)]
    with pytest.raises(EntryFault, match="1.png: No such file") as caught:
        data.read(10)
    assert caught.value.kind == "missing_image"
    with pytest.raises(InvalidInput, match="no source is for the stage finetune"):
        Mixture(sources=(SourceSettings(path="x", stage="pretrain"),)).of("finetune")
    file.write_text("sources: [{path: x, wait: 2}]")
    with pytest.raises(InvalidInput, match=r"sources\[0\].wait: unknown setting"):
        load_mixture(file)
