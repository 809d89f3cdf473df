"""Visual tokens in shared memory: what was left is found whole, and nobody else can leave or name anything."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from focusllava.v1 import encoder_pb2
from services.common import wire
from services.common.errors import InvalidInput, NotOnShelf
from services.common.shelf import FOLDER_VARIABLE, Shelf
from services.common.types import CompressedVisualTokens

LARGE = 2**20


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "shelf"))
    return tmp_path / "shelf"


@pytest.fixture
def shelf(folder) -> Shelf:
    shelf = Shelf.open()
    assert shelf is not None
    return shelf


def tokens(value: float = 1.5, dtype: torch.dtype = torch.bfloat16) -> CompressedVisualTokens:
    return CompressedVisualTokens(
        tokens_ND=torch.full((6, 4), value, dtype=dtype),
        branch_ids_M=torch.tensor([0, 2], dtype=torch.uint8),
        map_hw=(4, 4),
        uncompressed_tokens=36,
        content_hash="a" * 64,
        model_fingerprint="b" * 64,
        notes=("a note",),
    )


def left(shelf: Shelf, given: CompressedVisualTokens, claims: object = 1, max_bytes: int = LARGE):
    name = shelf.name(claims)
    assert wire.shelve(given, shelf, name, max_bytes)
    message = wire.described(given)
    message.shelf_name = name
    return message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_what_is_left_is_found_by_another_process_whole(shelf, dtype):
    given = tokens(dtype=dtype)
    message = left(shelf, given)
    assert not message.tokens.data and list(message.tokens.shape) == [6, 4] and message.ByteSize() < 300
    found = wire.tokens_from_proto(message, shelf=Shelf.open())  # another process opens its own
    assert found.digest == bytes.fromhex(message.shelf_name) and torch.equal(found.tokens_ND, given.tokens_ND)
    assert torch.equal(found.branch_ids_M, given.branch_ids_M)
    plain = {"tokens_ND": None, "branch_ids_M": None, "base_branch_ids_M": None, "digest": None}
    assert dataclasses.replace(found, **plain) == dataclasses.replace(given, **plain)
    found.tokens_ND.add_(1)  # its own: nobody else sees it
    assert torch.equal(wire.tokens_from_proto(message, shelf=Shelf.open()).tokens_ND, given.tokens_ND)


def test_a_message_may_have_its_tokens_put_back(shelf):
    message = left(shelf, tokens())
    assert wire.unshelve(message, shelf)
    assert message == wire.tokens_to_proto(tokens())
    assert wire.unshelve(message, None)  # it names nothing any more


def test_a_name_follows_from_all_that_decides_the_tokens_and_from_the_folder(shelf, monkeypatch, tmp_path):
    assert shelf.name(("x", True)) == shelf.name(("x", True)) != shelf.name(("x", False))
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "other"))
    assert Shelf.open().name(("x", True)) != shelf.name(("x", True))


def test_who_sees_the_same_folder_has_the_same_identity(shelf):
    assert Shelf.open().identity == shelf.identity and len(shelf.identity) == 64


@pytest.mark.parametrize("name", ["", "identity", "../identity", "a" * 63, "A" * 64, "f" * 64])
def test_other_names_find_nothing(shelf, name):
    assert shelf.get(name) is None
    if name:
        message = encoder_pb2.CompressedVisualTokens(shelf_name=name)
        with pytest.raises(NotOnShelf, match="visual_tokens.shelf_name: names nothing"):
            wire.tokens_from_proto(message, shelf=shelf)
        with pytest.raises(NotOnShelf):
            wire.tokens_from_proto(message)
        assert not wire.unshelve(message, shelf)


def test_the_longest_unused_make_room_and_what_is_open_stays(shelf, folder):
    first, second = (left(shelf, tokens(n), claims=n) for n in (1, 2))
    size = (folder / first.shelf_name).stat().st_size
    for age, message in ((20, first), (10, second)):
        os.utime(folder / message.shelf_name, ns=(1, 10**18 - age * 10**9))
    held = shelf.get(first.shelf_name)  # and so it is the one used last
    for n in (3, 4):
        left(shelf, tokens(n), claims=n, max_bytes=3 * size)
    assert shelf.get(second.shelf_name) is None
    (folder / first.shelf_name).unlink()
    assert shelf.get(first.shelf_name) is held
    assert torch.equal(wire.tokens_from_proto(first, shelf=shelf).tokens_ND, tokens(1).tokens_ND)
    assert sum(path.stat().st_size for path in folder.iterdir() if path.name != "identity") <= 3 * size


def test_what_has_no_room_is_sent(shelf):
    assert not wire.shelve(tokens(), shelf, shelf.name(1), 40)
    assert not list(shelf._folder.glob("*.new"))


def test_a_folder_that_others_can_enter_is_no_shelf(folder):
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    assert Shelf.open() is None


def test_a_link_in_the_folders_place_is_no_shelf(folder, tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "real")
    assert Shelf.open() is None


def test_a_file_that_is_not_what_it_says_is_refused(shelf, folder):
    message = left(shelf, tokens())
    with open(folder / message.shelf_name, "ab") as file:
        file.write(b"more")
    with pytest.raises(InvalidInput, match="has 52 bytes, expected 48"):
        wire.tokens_from_proto(message, shelf=Shelf.open())
