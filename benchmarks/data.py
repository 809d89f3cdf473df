"""What the index of a large data file costs: time to make it, time to open it, memory of a process that reads.

The file is written first, in LLaVA's format, about a kilobyte an entry, with a few images that all entries share. Each
measurement has a process of its own. The memory is that of a background process of a loader with two of them, after 50
micro-batches: all that it has mapped, and of that what it shares with nobody. Prints a table and writes the figures to
a JSON file.

    python -m benchmarks.data --entries 1000000
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile

from PIL import Image

from benchmarks.measure import machine, print_table, write_results

IMAGES = 16
WORDS = (
    "the a photo of red blue man woman street car large small several people holding it appears that because".split()
)
MEASURE = """
import json, sys, time
from training.data.mixture import ConversationData, load_mixture
from training.data.order import epoch_entries, epoch_order
import numpy as np

def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

began = time.perf_counter()
mixture = load_mixture(sys.argv[1])
data = ConversationData(mixture)
opened = time.perf_counter() - began
order = epoch_order(epoch_entries(data.ranges, mixture.sources, 0, 0), data.lengths, 128, 0, 0)
ordered = time.perf_counter() - began - opened
draw = np.random.default_rng(0)
began = time.perf_counter()
for entry in draw.integers(0, len(data), 2000):
    data.read_raw(entry)
read = (time.perf_counter() - began) / 2000
print(json.dumps({"entries": len(data), "open_s": opened, "order_s": ordered, "read_entry_ms": 1e3 * read,
                  "peak_mib": memory("VmHWM")}))
"""
READ = """
import json, sys
from training.data.loading import ConversationLoader

def memory(process, *names):
    lines = [line.split() for line in open(f"/proc/{process}/smaps_rollup").read().splitlines()]
    return sum(int(line[1]) / 1024 for line in lines if line[0].rstrip(":") in names)

loader = ConversationLoader(sys.argv[1], sys.argv[2], batch_size=2, processes=2)
for step in range(50):
    loader.batch(step, 0, 0, 1)
found = [(memory(one, "Rss"), memory(one, "Private_Clean", "Private_Dirty")) for one in loader.process_ids()]
print(json.dumps(dict(zip(("worker_mib", "worker_own_mib"), max(found)))))
"""


def write_file(path: pathlib.Path, entries: int) -> None:
    """Conversations of one to five exchanges, one entry of sixteen without an image, and the images beside it."""
    draw = random.Random(0)
    for number in range(IMAGES):
        Image.effect_noise((640, 480), 60).convert("RGB").save(path.parent / f"{number}.jpg")
    with path.open("w", encoding="utf8") as file:
        for number in range(entries):
            turns = []
            for turn in range(draw.choice((1, 1, 2, 3, 5))):
                mark = "<image>\n" if turn == 0 and number % 16 else ""
                turns.append({"from": "human", "value": mark + " ".join(draw.choices(WORDS, k=12))})
                turns.append({"from": "gpt", "value": " ".join(draw.choices(WORDS, k=draw.choice((3, 40, 80))))})
            image = {"image": f"{number % IMAGES}.jpg"} if number % 16 else {}
            entry = {"id": f"{number:09d}", **image, "conversations": turns}
            file.write(("[\n" if number == 0 else ",\n") + json.dumps(entry))
        file.write("\n]\n")


def measure(program: str, path: pathlib.Path, cache: pathlib.Path, *arguments: str) -> dict[str, float]:
    environment = {**os.environ, "FOCUSLLAVA_DATA_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(path), *arguments],
        env=environment, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--checkpoint", default="checkpoints/focusllava-tiny", help="whose tokenizer and tiling decide")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path, cache = pathlib.Path(folder) / "conversations.json", pathlib.Path(folder) / "cache"
        write_file(path, arguments.entries)
        size = path.stat().st_size
        made, opened = (measure(MEASURE, path, cache) for _ in range(2))
        opened |= measure(READ, path, cache, arguments.checkpoint)
    rows = {
        "data file": f"{size / 2**20:,.0f} MiB",
        "index made and opened": f"{made['open_s']:.1f} s",
        "peak memory of making it": f"{made['peak_mib']:.0f} MiB",
        "index opened": f"{opened['open_s']:.2f} s",
        "order of an epoch": f"{opened['order_s']:.2f} s",
        "an entry read": f"{opened['read_entry_ms']:.2f} ms",
        "memory of a process that reads": f"{opened['worker_mib']:.0f} MiB",
        "of which it shares with none": f"{opened['worker_own_mib']:.0f} MiB",
    }
    print_table(("entries", f"{arguments.entries:,}"), rows.items())
    content = {"machine": machine(range(os.cpu_count() or 1)), "file_bytes": size, "made": made, "opened": opened}
    write_results("data", content, arguments.out or "data")


if __name__ == "__main__":
    main()
