"""Batches are a function of seed, step, micro-batch and rank; unusable entries are replaced, counted and named."""

import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from services.common.errors import InternalError, InvalidInput
from tests.tiny_checkpoints import make_random_checkpoint
from training.data.check import check
from training.data.faults import KINDS
from training.data.loading import ConversationLoader, most_bad
from training.data.mixture import Mixture, SourceSettings, load_mixture
from training.data.order import epoch_entries, epoch_order, epoch_size, share

GOOD = 400
BAD_OF_A_KIND = 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    make_random_checkpoint(folder)
    return folder


def turns(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def bad_entry(kind, number):
    image = {"malformed": 7, "missing_image": "none.png", "corrupt_image": "corrupt.jpg", "image_size": "narrow.png"}
    entry = {
        "id": f"{kind} {number}",
        "image": image.get(kind, "0.png"),
        "conversations": turns("<image>\nWhat?", "It."),
    }
    if kind == "turn_order":
        entry["conversations"] *= 1
        entry["conversations"].insert(0, turns("<image>", "")[0])
        entry["image"] = ["0.png", "1.png"]
    elif kind == "image_marks":
        entry["image"] = ["0.png", "1.png", "2.png"]
    elif kind == "empty_answer":
        entry["conversations"][1]["value"] = ""
    elif kind == "too_long":
        entry["conversations"][0]["value"] = "word " * 3000
    return entry


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file of good entries, every fourth without an image, and two bad ones of each kind among them."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(4):
        Image.new("RGB", (30 + number, 40), (number * 60, 0, 0)).save(folder / f"{number}.png")
    (folder / "corrupt.jpg").write_bytes(b"\xff\xd8\xff nothing")
    Image.new("RGB", (3000, 20)).save(folder / "narrow.png")
    entries = []
    for number in range(GOOD):
        image = {"image": f"{number % 4}.png"} if number % 4 else {}
        entries.append(
            {"id": number, **image, "conversations": turns("What is it? " * (1 + number % 7), f"No. {number}")}
        )
    for number in range(BAD_OF_A_KIND):
        for place, kind in enumerate(KINDS):
            entries.insert(37 * place + 19 * number, bad_entry(kind, number))
    (folder / "bad.json").write_text(json.dumps(entries, indent=1))
    (folder / "good.json").write_text(json.dumps([entry for entry in entries if isinstance(entry["id"], int)]))
    return folder


def names(sequences):
    return [sequence.name.rpartition("[")[2] for sequence in sequences]


def step_of(loader, step, world_size):
    return [name for rank in range(world_size) for micro in range(loader.accumulation)
            for name in names(loader.batch(step, micro, rank, world_size))]  # fmt: skip


def test_a_step_has_the_same_entries_for_every_number_of_workers(folder, checkpoint):
    loaders = {
        world: ConversationLoader(folder / "good.json", checkpoint, batch_size=size, accumulation=accumulation)
        for world, size, accumulation in ((1, 8, 1), (2, 4, 1), (2, 2, 2), (4, 1, 2))
    }
    for step in (0, 30, 70):
        steps = [sorted(step_of(loader, step, world)) for world, loader in loaders.items()]
        assert all(entries == steps[0] for entries in steps) and len(set(steps[0])) == 8
    loader = loaders[1]
    assert loader.entries == GOOD and loader.steps_per_epoch(1) == 50
    epoch = [name for step in range(50) for name in step_of(loader, step, 1)]
    assert sorted(epoch, key=int_of) == [f"{n}]" for n in range(GOOD)]
    assert [step_of(loader, step, 1) for step in range(50, 60)] != [step_of(loader, step, 1) for step in range(10)]
    other = ConversationLoader(folder / "good.json", checkpoint, batch_size=8, seed=1)
    assert step_of(other, 0, 1) != step_of(loader, 0, 1) and other.identity() != loader.identity()


def int_of(name):
    return int(name.rstrip("]"))


def test_batches_are_of_one_kind_and_like_lengths(folder, checkpoint):
    loader = ConversationLoader(folder / "good.json", checkpoint, batch_size=4)
    batches = [loader.batch(step, 0, 0, 1) for step in range(loader.steps_per_epoch(1))]
    kinds = [{bool(sequence.images) for sequence in batch} for batch in batches]
    assert all(len(kind) == 1 for kind in kinds) and {True} in kinds and {False} in kinds
    assert loader.counters()["entries"] == GOOD and loader.counters()["bad"] == 0


def test_every_unusable_entry_is_replaced_counted_and_named(folder, checkpoint):
    loader = ConversationLoader(folder / "bad.json", checkpoint, batch_size=8, max_length=2048, max_bad_share=0.05)
    entries = json.loads((folder / "bad.json").read_text())
    seen = [name for step in range(loader.steps_per_epoch(1)) for name in step_of(loader, step, 1)]
    counted = loader.counters()
    assert {kind: counted[f"bad/{kind}"] for kind in KINDS} == dict.fromkeys(KINDS, BAD_OF_A_KIND)
    assert counted["bad"] == len(KINDS) * BAD_OF_A_KIND and counted["entries"] == len(seen) == len(entries)
    assert all(isinstance(entries[int_of(name)]["id"], int) for name in seen)
    named = {(fault.kind, int_of(fault.name.rpartition("[")[2])) for fault in loader.faults}
    assert named == {(e["id"].split()[0], n) for n, e in enumerate(entries) if isinstance(e["id"], str)}
    again = ConversationLoader(folder / "bad.json", checkpoint, batch_size=8, max_length=2048, max_bad_share=0.05)
    assert step_of(again, 20, 1) == seen[160:168]


def test_too_many_unusable_entries_end_the_run(folder, checkpoint, tmp_path):
    entries = [bad_entry("missing_image" if number % 2 else "image_marks", 0) for number in range(100)]
    entries += json.loads((folder / "good.json").read_text())[1:100:4]
    (tmp_path / "d.json").write_text(json.dumps(entries))
    loader = ConversationLoader(tmp_path / "d.json", checkpoint, batch_size=5, images=str(folder))
    with pytest.raises(
        InvalidInput, match=r"of the first \d+ entries cannot be used, .*max_bad_share 0.01; the last: .*d.json"
    ):
        for step in range(20):
            loader.batch(step, 0, 0, 1)
    (tmp_path / "e.json").write_text(json.dumps(entries[:10]))
    with pytest.raises(InvalidInput, match="what follows it cannot be used: .*(missing_image|image_marks)"):
        ConversationLoader(tmp_path / "e.json", checkpoint, batch_size=1, images=str(folder)).batch(0, 0, 0, 1)
    resumed = ConversationLoader(tmp_path / "d.json", checkpoint, batch_size=5, images=str(folder))
    resumed.count_on({"entries": 1000, "bad": 25})
    with pytest.raises(InvalidInput, match=r"3\d of the first 10\d\d entries cannot be used"):
        for step in range(20):
            resumed.batch(step, 0, 0, 1)
    assert most_bad(0.01, 100) < 20 and 100 < most_bad(0.01, 10_000) < 150


def test_background_processes_change_nothing_and_their_death_is_told(folder, checkpoint):
    settings = dict(batch_size=2, accumulation=2, max_bad_share=0.05, max_length=2048)
    here = ConversationLoader(folder / "bad.json", checkpoint, **settings)
    ahead = ConversationLoader(folder / "bad.json", checkpoint, processes=2, **settings)
    for step in (*range(12, 16), 3, 4):  # a jump, as after a resumption
        for micro in range(2):
            for mine, other in zip(here.batch(step, micro, 1, 2), ahead.batch(step, micro, 1, 2), strict=True):
                assert mine.name == other.name and torch.equal(mine.input_ids, other.input_ids)
                assert torch.equal(mine.labels, other.labels) and torch.equal(mine.instruction, other.instruction)
                for image, shared in zip(mine.images, other.images, strict=True):
                    assert torch.equal(image.pixels_T3HW, shared.pixels_T3HW) and image.grid_hw == shared.grid_hw
    assert here.counters() == ahead.counters()
    os.kill(ahead.process_ids()[0], signal.SIGKILL)
    with pytest.raises((InternalError, RuntimeError), match="killed|died"):
        for step in range(4, 200):
            ahead.batch(step, 0, 1, 2)
            time.sleep(0.01)
    ahead.close()


def test_weights_and_counts_say_how_often_entries_come():
    ranges, lengths = ((0, 10), (10, 110)), np.arange(1, 111)
    sources = (SourceSettings(path="a", weight=2.5), SourceSettings(path="b", count=20))
    assert epoch_size(ranges, sources) == 45
    first, second = (epoch_entries(ranges, sources, 0, epoch) for epoch in (0, 1))
    assert len(first) == 45 and (np.bincount(first, minlength=110)[:10] >= 2).all()
    assert len(set(first[25:])) == 20 and set(first[25:]) != set(second[25:])
    order = epoch_order(first, lengths, 8, 0, 0)
    assert order.shape == (6, 8) and (order[-1] < 0).sum() == 3
    assert sorted(order[order >= 0].tolist()) == sorted(first.tolist())
    parts = [share(order[0], micro, rank, 2, 2) for micro in range(2) for rank in range(2)]
    assert sorted(np.concatenate(parts).tolist()) == sorted(order[0].tolist())
    ranks = {rank for batch in order for rank in range(2) if batch[-1] in share(batch, 0, rank, 1, 2)}
    assert ranks == {0, 1}  # nobody always has the shortest
    assert Mixture(sources=sources).of(None).sources == sources


def test_a_check_in_several_processes_finds_the_same(folder, checkpoint):
    mixture = load_mixture(folder / "bad.json")
    alone, limit = check(mixture, str(checkpoint), processes=0)
    shared, again = check(mixture, str(checkpoint), processes=2)
    assert list(alone.lines(limit)) == list(shared.lines(again)) and limit == 2048
    assert {fault.kind for fault in shared.faults} == set(KINDS) and len(shared.faults) == len(KINDS) * BAD_OF_A_KIND
