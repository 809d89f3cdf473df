"""Replicas over time: first many images and short answers, then words and long answers, with a pause after each.

    python -m benchmarks.autoscaling checkpoints/focusllava-tiny

The cluster has the shipped Serve configuration with shorter delays, and up to `--most` replicas of each stage; without
images none of the encoder. Every two seconds it is asked which replicas run and what the policies read of them. Fails
where a phase grows the other stage, or where its own does not come down again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import itertools
import pathlib
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from benchmarks.measure import RESULTS, ROOT, machine, write_results
from benchmarks.replica_tables import SIGNALS, autoscaling
from cluster.local import SERVE_CONFIG, LocalCluster
from cluster.serve_api import request_json
from focusllava import FocusClient, user

STAGES = {"encoder": "Encoder", "llm": "LanguageModel"}
EVERY_S = 2.0
LONGEST_S = 240.0
"""Longest that a phase may take to bring replicas, or to lose them."""


class Watch:
    """Notes every two seconds which replicas run, and the sums of what the policies read."""

    def __init__(self, cluster: LocalCluster):
        self._cluster, self._began = cluster, time.monotonic()
        self.phase, self.points = "", list[dict[str, Any]]()

    def look(self) -> dict[str, Any]:
        """Waits for the next moment; returns what is seen then."""
        time.sleep(EVERY_S)
        applications = request_json(self._cluster.state, "/api/serve/applications/")["applications"]
        running = {
            stage: sum(r["state"] == "RUNNING" for r in applications[stage]["deployments"][name]["replicas"])
            for stage, name in STAGES.items()
        }
        with urllib.request.urlopen(self._cluster.metrics_url, timeout=30) as page:
            text = page.read().decode()
        read = {
            name: sum(map(float, re.findall(rf"^ray_{gauge}\{{[^\n]*\}} (\S+)$", text, re.MULTILINE)))
            for name, gauge in SIGNALS.items()
        }
        point = {"seconds": time.monotonic() - self._began, "phase": self.phase, **running, **read}
        self.points.append(point)
        print(f"bench: {point['seconds']:4.0f} s  {self.phase:<12} {running}", flush=True)
        return point

    def until(self, condition: Callable[[dict[str, Any]], bool]) -> bool:
        end = time.monotonic() + LONGEST_S
        while time.monotonic() < end:
            if condition(self.look()):
                return True
        return False


@contextlib.contextmanager
def asking(ask: Callable[[], object], clients: int) -> Iterator[None]:
    """Has so many clients ask without pause for the time of a `with` block; raises what one of them raised."""
    done = threading.Event()

    def keep_asking() -> None:
        while not done.is_set():
            ask()

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        each = [pool.submit(keep_asking) for _ in range(clients)]
        try:
            yield
        finally:
            done.set()
        for one in each:
            one.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("--image", type=pathlib.Path, default=ROOT / "docs" / "assets" / "sample.png")
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--most", type=int, default=2, help="replicas of each stage")
    parser.add_argument("--upscale-delay", type=float, default=2.0, help="seconds")
    parser.add_argument("--downscale-delay", type=float, default=10.0, help="seconds")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "autoscaling.json")
    options = parser.parse_args()

    delays = {"upscale_delay_s": options.upscale_delay, "downscale_delay_s": options.downscale_delay}
    scaling = {stage: _scaling(stage) | delays | {"look_back_period_s": 5, "metrics_interval_s": 1} for stage in STAGES}
    for stage, least in (("encoder", 0), ("llm", 1)):
        scaling[stage] |= {"min_replicas": least, "max_replicas": options.most}
    image, fresh = options.image.read_bytes(), itertools.count()
    with LocalCluster(
        checkpoint=options.checkpoint, grpc_port=0, timeout_s=400, args={"llm": {"kv_cache_bytes": 256 * 2**20}},
        options={stage: {"autoscaling_config": mine} for stage, mine in scaling.items()},
    ) as cluster:  # fmt: skip
        cluster.start(lambda line: print(f"bench: {line}", flush=True))
        watch = Watch(cluster)
        with FocusClient(cluster.grpc_address, timeout_s=240) as client:

            def images() -> None:
                # Readers ignore bytes after a picture's end: the same picture, under a hash that nobody has seen.
                client.ask(image + next(fresh).to_bytes(4, "big"), "What is this?", max_tokens=1).result()

            def words() -> None:
                client.chat([user("Tell me a story.")], max_tokens=600, ignore_eos=True).result()

            held = all(
                phase(watch, *each, clients=options.clients, most=options.most)
                for each in (("images", images, "encoder"), ("long answers", words, "llm"))
            )
    print()
    print(autoscaling(watch.points))
    content = {
        "checkpoint": options.checkpoint.name, "machine": machine(range(2)), "scaling": scaling,
        "clients": options.clients, "points": watch.points,
    }  # fmt: skip
    write_results("autoscaling", content, options.out)
    if not held:
        raise SystemExit("a stage did not grow, grew by the other's work, or did not come down")


def _scaling(stage: str) -> dict[str, Any]:
    config = yaml.safe_load(SERVE_CONFIG.read_text("utf8"))
    (deployment,) = next(each for each in config["applications"] if each["name"] == stage)["deployments"]
    return dict(deployment["autoscaling_config"])


def phase(watch: Watch, name: str, ask: Callable[[], object], stage: str, *, clients: int, most: int) -> bool:
    """Load until its stage has `most` replicas, then none until that came down; whether the other stage held still."""
    (other,) = STAGES.keys() - {stage}
    watch.phase = name
    began = len(watch.points)
    with asking(ask, clients):
        grew = watch.until(lambda point: bool(point[stage] == most))
        for _ in range(5):
            watch.look()
    watch.phase = "none"
    fell = watch.until(lambda point: bool(point[stage] <= 1 and point["llm"] == 1 and point["encoder"] == 0))
    still = {point[other] for point in watch.points[began:]}
    return grew and fell and len(still) == 1


if __name__ == "__main__":
    main()
