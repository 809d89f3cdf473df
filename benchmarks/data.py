"""What the index of a large data file costs: time to make it, time to open it, memory of a worker.

The file is written first, in LLaVA's format, about a kilobyte an entry. Each measurement has a process of its own, so
that nobody's memory is another's. Prints a table and writes the figures to a JSON file.

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

from benchmarks.measure import machine, print_table, write_results

WORDS = (
    "the a photo of red blue man woman street car large small several people holding it appears that because".split()
)
MEASURE = """
import json, resource, sys, time
from training.data.mixture import ConversationData, load_mixture
from training.data.order import epoch_entries, epoch_order
import numpy as np

def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

before, began = memory("VmRSS"), time.perf_counter()
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
                  "memory_before_mib": before, "memory_mib": memory("VmRSS"), "peak_mib": memory("VmHWM")}))
"""


def write_file(path: pathlib.Path, entries: int) -> None:
    """Conversations of one to five exchanges, one entry of sixteen without an image."""
    draw = random.Random(0)
    with path.open("w", encoding="utf8") as file:
        for number in range(entries):
            turns = []
            for turn in range(draw.choice((1, 1, 2, 3, 5))):
                mark = "<image>\n" if turn == 0 and number % 16 else ""
                turns.append({"from": "human", "value": mark + " ".join(draw.choices(WORDS, k=12))})
                turns.append({"from": "gpt", "value": " ".join(draw.choices(WORDS, k=draw.choice((3, 40, 80))))})
            image = {"image": f"coco/train2017/{number:012d}.jpg"} if number % 16 else {}
            entry = {"id": f"{number:09d}", **image, "conversations": turns}
            file.write(("[\n" if number == 0 else ",\n") + json.dumps(entry))
        file.write("\n]\n")


def measure(path: pathlib.Path, cache: pathlib.Path) -> dict[str, float]:
    environment = {**os.environ, "FOCUSLLAVA_DATA_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], env=environment, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path, cache = pathlib.Path(folder) / "conversations.json", pathlib.Path(folder) / "cache"
        write_file(path, arguments.entries)
        size = path.stat().st_size
        made = measure(path, cache)
        opened = measure(path, cache)
    rows = {
        "data file": f"{size / 2**20:,.0f} MiB",
        "index made and opened": f"{made['open_s']:.1f} s",
        "peak memory of making it": f"{made['peak_mib']:.0f} MiB",
        "index opened": f"{opened['open_s']:.2f} s",
        "order of an epoch": f"{opened['order_s']:.2f} s",
        "an entry read": f"{opened['read_entry_ms']:.2f} ms",
        "memory of a worker": f"{opened['memory_mib']:.0f} MiB",
        "of which before the data": f"{opened['memory_before_mib']:.0f} MiB",
    }
    print_table(("entries", f"{arguments.entries:,}"), rows.items())
    content = {"machine": machine(range(os.cpu_count() or 1)), "file_bytes": size, "made": made, "opened": opened}
    write_results("data", content, arguments.out or "data")


if __name__ == "__main__":
    main()
