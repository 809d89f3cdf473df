"""A conversation set to fine-tune on: documents drawn with real words and fonts, photos of scikit-image, every format.

    python -m tests.smollm.conversations FOLDER

FOLDER then holds `mixture.yaml`, which names the rest: `captions.json` for the projector, then `documents.json`,
`texts.jsonl`, `photos.parquet` and `pairs.tar`; with `--faults` some entries cannot be learned from. The same seed
draws the same set.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import pathlib
import random
import tarfile
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

Entry = dict[str, Any]
PHOTOS = {
    "chelsea.png": "A tabby cat with green eyes looks to the side.",
    "coffee.png": "A cup of coffee stands on a saucer with a spoon.",
    "rocket.jpg": "A rocket stands on its launch pad in bright light.",
    "hubble_deep_field.jpg": "Many galaxies of different colours are spread over a black sky.",
    "retina.jpg": "The back of an eye, orange, with its blood vessels.",
    "coins.png": "Old coins lie in four rows on a dark ground.",
    "brick.png": "A wall of bricks, in grey.",
    "grass.png": "Grass from above, in grey.",
    "moon.png": "The surface of the moon with a crater.",
    "horse.png": "The black outline of a horse.",
    "page.png": "A page of printed text, unevenly lit.",
    "motorcycle_left.png": "A motorcycle stands in a workshop.",
}
GOODS = ("paper", "ink", "lamp", "chair", "desk", "cable", "screen", "keyboard", "shelf", "clock", "plant", "rug")
NAMES = ("Ada Brown", "Ben Carter", "Cleo Diaz", "Dan Evans", "Eva Fischer", "Finn Gray", "Gina Hall", "Hugo Ito")
TOWNS = ("Bergen", "Cork", "Delft", "Ghent", "Leeds", "Lyon", "Porto", "Turin")
CAPTION = "An invoice with a table of goods."
MIXTURE = """\
sources:
  - {name: captions, stage: pretrain, path: captions.json}
  - {name: documents, stage: finetune, path: documents.json}
  - {name: texts, stage: finetune, path: texts.jsonl}
  - {name: photos, stage: finetune, path: photos.parquet}
  - {name: pairs, stage: finetune, path: pairs.tar}
"""
FACTS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many days has a leap year?", "A leap year has 366 days."),
    ("Name three primary colours.", "Red, yellow and blue."),
    ("What do bees make?", "Bees make honey and wax."),
)


def fonts() -> list[pathlib.Path]:
    """TrueType fonts of this machine; empty where there are none, and Pillow's own is taken."""
    return sorted(pathlib.Path("/usr/share/fonts").glob("**/*.ttf"))


def photo_folder() -> pathlib.Path:
    """Where scikit-image keeps its photos; it is found, not imported."""
    package = importlib.util.find_spec("skimage")
    assert package is not None and package.origin is not None, "scikit-image is not installed"
    return pathlib.Path(package.origin).parent / "data"


def turns(*said: str) -> list[dict[str, str]]:
    """Questions and answers by turns, in LLaVA's format."""
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(said)]


def invoice(rng: random.Random) -> tuple[Image.Image, list[tuple[str, str]]]:
    """An invoice of 1,000 to 1,344 pixels a side, and questions about it with their answers."""
    files = fonts()
    size = rng.randint(20, 28)

    def font(px: int) -> Any:
        return ImageFont.truetype(str(rng.choice(files)), px) if files else ImageFont.load_default(px)

    name, town, number = rng.choice(NAMES), rng.choice(TOWNS), rng.randint(1000, 9999)
    lines = [(good, rng.randint(1, 9), rng.randint(2, 90)) for good in rng.sample(GOODS, rng.randint(3, 7))]
    page = Image.new("RGB", (rng.randint(1000, 1344), rng.randint(1000, 1344)), rng.choice(("white", "ivory", "azure")))
    draw, y = ImageDraw.Draw(page), 60
    draw.text((60, y), f"Invoice {number}", "black", font(2 * size))
    for text in (f"For: {name}", f"Town: {town}"):
        y += 3 * size
        draw.text((60, y), text, "black", font(size))
    y += 3 * size
    body = font(size)
    for good, count, price in lines:
        y += 2 * size
        draw.text((60, y), good, "black", body)
        draw.text((500, y), f"{count} x {price}", "black", body)
        draw.text((760, y), str(count * price), "black", body)
    total = sum(count * price for _, count, price in lines)
    draw.text((60, y + 3 * size), f"Total {total}", "black", font(size + 6))
    asked = [
        ("What is the number of the invoice?", str(number)),
        ("Who is it for?", name),
        ("Which town is named?", town),
        ("What is the total?", str(total)),
        *((f"How many of {good}?", str(count)) for good, count, _ in lines),
    ]
    return page, asked


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=90)
    return file.getvalue()


def documents(folder: pathlib.Path, count: int, rng: random.Random) -> Iterator[Entry]:
    """Conversations of up to ten turns about one invoice each."""
    (folder / "documents").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        page, asked = invoice(rng)
        path = f"documents/{number:05d}.jpg"
        (folder / path).write_bytes(jpeg(page))
        some = rng.sample(asked, min(len(asked), rng.randint(1, 10)))
        said = [text for question_answer in some for text in question_answer]
        yield {"id": f"document-{number}", "image": path, "conversations": turns("<image>\n" + said[0], *said[1:])}


def texts(count: int, rng: random.Random) -> Iterator[Entry]:
    """Conversations without an image: some begin with the assistant or a system turn, some answers are very long."""
    for number in range(count):
        said = turns(*(text for fact in rng.sample(FACTS, rng.randint(1, 3)) for text in fact))
        if number % 5 == 1:
            said = [{"from": "gpt", "value": "Hello, what would you like to know?"}, *said]
        elif number % 5 == 2:
            said = [{"from": "system", "value": "Answer in one sentence."}, *said]
        elif number % 5 == 3:
            said[-1]["value"] = " ".join(f"{n} is followed by {n + 1}." for n in range(1500))
        yield {"id": f"text-{number}", "conversations": said}


def photos() -> Iterator[tuple[str, bytes, str]]:
    """File name, bytes and caption of each photo."""
    for name, caption in PHOTOS.items():
        yield name, (photo_folder() / name).read_bytes(), caption


def faults(folder: pathlib.Path) -> Iterator[Entry]:
    """One entry of each kind that cannot be learned from."""
    folder.joinpath("documents").mkdir(parents=True, exist_ok=True)
    whole = jpeg(Image.new("RGB", (700, 700), "white"))
    for name, data in {
        "cut": whole[: len(whole) // 2],
        "words": b"this is no image",
        "strip": jpeg(Image.new("RGB", (4000, 3), "white")),
        "good": whole,
    }.items():
        (folder / f"documents/fault-{name}.jpg").write_bytes(data)
    asked = turns("<image>\nWhat is this?", "A white square.")
    yield {"id": "missing", "image": "documents/nowhere.jpg", "conversations": asked}
    yield {"id": "cut", "image": "documents/fault-cut.jpg", "conversations": asked}
    yield {"id": "words", "image": "documents/fault-words.jpg", "conversations": asked}
    yield {"id": "strip", "image": "documents/fault-strip.jpg", "conversations": asked}
    good = "documents/fault-good.jpg"
    yield {"id": "no-turns", "image": good, "conversations": []}
    yield {"id": "no-value", "image": good, "conversations": [{"from": "human"}, {"from": "gpt", "value": "?"}]}
    yield {"id": "marks", "image": good, "conversations": turns("<image><image>\nWhat are these?", "Squares.")}
    yield {"id": "no-answer", "image": good, "conversations": turns("<image>\nWhat is this?", "")}


def write_all(folder: pathlib.Path, *, count: int, with_faults: bool, seed: int = 0) -> None:
    """Writes the set; count: documents, and text-only conversations."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    entries = list(documents(folder, count, rng))
    if with_faults:
        entries += faults(folder)
    (folder / "documents.json").write_text(json.dumps(entries, indent=1))
    with (folder / "texts.jsonl").open("w") as file:
        for entry in texts(count, rng):
            file.write(json.dumps(entry) + "\n")
    rows = [
        {
            "id": name,
            "image": {"bytes": data, "path": name},
            "conversations": turns("What does the picture show?\n<image>", caption),
        }
        for name, data, caption in photos()
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "photos.parquet", row_group_size=4)
    shown = list(photos())
    with tarfile.open(folder / "pairs.tar", "w") as tar:
        for number in range(len(shown)):
            (first, data, caption), (second, data2, caption2) = rng.sample(shown, 2)
            said = turns("<image>\nWhat is this?", caption, "And this? <image>", caption2)
            names = [f"pair-{number}.0{pathlib.Path(first).suffix}", f"pair-{number}.1{pathlib.Path(second).suffix}"]
            entry = {"id": f"pair-{number}", "image": names, "conversations": said}
            for name, content in (
                (names[0], data),
                (names[1], data2),
                (f"pair-{number}.json", json.dumps(entry).encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    captions = [
        {
            "id": entry["id"],
            "image": entry["image"],
            "conversations": turns("<image>", CAPTION),
        }
        for entry in entries[:count]
    ]
    (folder / "captions.json").write_text(json.dumps(captions, indent=1))
    (folder / "mixture.yaml").write_text(MIXTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--count", type=int, default=60, help="documents, and text-only conversations")
    parser.add_argument("--faults", action="store_true", help="with entries that training has to skip")
    options = parser.parse_args()
    write_all(options.folder, count=options.count, with_faults=options.faults)
    print(f"{options.folder}: {', '.join(sorted(path.name for path in options.folder.iterdir()))}")


if __name__ == "__main__":
    main()
