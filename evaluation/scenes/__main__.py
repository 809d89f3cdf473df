"""Writes benchmark images and their questions: python -m evaluation.scenes --split test --images 3 --out FOLDER"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from dataclasses import asdict

from evaluation.scenes.images import SEEDS, benchmark_images
from evaluation.scenes.version import benchmark_version
from services.common.errors import InvalidInput


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=tuple(SEEDS), default="test")
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--seed", type=int, help="the split's own when left out")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder, made when it is not there")
    arguments = parser.parse_args()
    try:
        pairs = benchmark_images(arguments.split, arguments.images, arguments.seed)
    except InvalidInput as error:
        sys.exit(str(error))
    arguments.out.mkdir(parents=True, exist_ok=True)
    written = []
    for index, (file, asked) in enumerate(pairs):
        name = f"{index:05d}.png"
        (arguments.out / name).write_bytes(file)
        written.append({"file": name, "questions": [asdict(question) for question in asked]})
    contents = {
        "version": benchmark_version(),
        "split": arguments.split,
        "seed": SEEDS[arguments.split] if arguments.seed is None else arguments.seed,
        "images": written,
    }
    (arguments.out / "questions.json").write_text(json.dumps(contents, indent=1) + "\n", encoding="utf8")
    print(f"{len(written)} images of {arguments.split}, benchmark {contents['version']}, in {arguments.out}")


if __name__ == "__main__":
    main()
