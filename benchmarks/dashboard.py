"""Every panel of the dashboard under load: does its query return data from a real Prometheus, and is it true?

    python -m benchmarks.dashboard [--seconds 150] [--picture docs/assets/dashboard.png]

Starts a local cluster, a Prometheus beside it, and clients: fresh and known images, bad requests, cancelled ones, both
APIs, a language model replica that is killed, and a short training run. Then each panel's query is asked; totals that
the clients know are compared with Prometheus'; alert rules are shown. Fails if a panel is empty or a total differs.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import itertools
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from typing import Any

from benchmarks.measure import print_table
from benchmarks.prometheus import Line, Prometheus
from cluster.dashboard import ROWS
from cluster.local import LocalCluster
from cluster.ray_head import cluster_environment
from focusllava import Answer, FocusClient, FocusClientError

ROOT = pathlib.Path(__file__).resolve().parent.parent
IMAGE = ROOT / "docs" / "assets" / "sample.png"
QUESTION, LONG = "What number is on the red card?", 900
"""What is asked, and the tokens of an answer that lasts."""
SETTLE_S = 15
"""Time for the last values to be reported and scraped."""


class Load:
    """Clients that ask until a moment, and what they were told."""

    def __init__(self, cluster: LocalCluster, clients: int):
        self._cluster, self._clients = cluster, clients
        self._image, self._fresh = IMAGE.read_bytes(), itertools.count(1)
        self.totals: collections.Counter[str] = collections.Counter()

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        with FocusClient(self._cluster.grpc_address, timeout_s=120) as client:
            with concurrent.futures.ThreadPoolExecutor(self._clients) as pool:
                for done in [pool.submit(self._ask_until, client, end) for _ in range(self._clients)]:
                    done.result()

    def _ask_until(self, client: FocusClient, end: float) -> None:
        while time.monotonic() < end:
            turn = next(self._fresh)
            # Readers ignore bytes after a picture's end: the same picture, under a hash that nobody has seen.
            image = self._image if turn % 3 == 0 else self._image + turn.to_bytes(4, "big")
            self._ask(client, image)
            if turn % 5 == 0:
                self._refused(client)
            if turn % 7 == 0:
                with client.ask(image, QUESTION, max_tokens=LONG, ignore_eos=True) as stream:
                    if next(stream, None) is None:  # it ended first
                        self._count(stream.result())
            if turn % 4 == 0:
                self._over_http()

    def lose_replica(self) -> None:
        """Kills the language model's replica in the middle of some long answers, and waits for their ends."""
        with FocusClient(self._cluster.grpc_address, timeout_s=240) as client:
            asked = [client.ask(self._image, QUESTION, max_tokens=LONG, ignore_eos=True) for _ in range(self._clients)]
            with concurrent.futures.ThreadPoolExecutor(self._clients) as pool:
                list(pool.map(lambda stream: next(stream, None), asked))
                kill_replica(self._cluster, "llm")
                for answer in pool.map(lambda stream: stream.result(), asked):
                    self._count(answer)

    def _ask(self, client: FocusClient, image: bytes) -> None:
        self._count(client.ask(image, QUESTION, max_tokens=24, ignore_eos=True).result())

    def _count(self, answer: Answer) -> None:
        usage = answer.usage
        self.totals["requests"] += 1
        for name in ("uncompressed", "sampled", "kept"):
            self.totals[f"visual_tokens_{name}"] += getattr(usage, f"visual_tokens_{name}")
        self.totals["output_tokens"] += usage.completion_tokens
        self.totals["prompt_tokens"] += usage.prompt_tokens

    def _refused(self, client: FocusClient) -> None:
        with contextlib.suppress(FocusClientError):
            client.ask(self._image, "What?", top_p=0.5, max_tokens=10**9).result()

    def _over_http(self) -> None:
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(f"{self._cluster.openai_url}/models/another", timeout=30)
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(f"{self._cluster.openai_url}/models", timeout=30)


def kill_replica(cluster: LocalCluster, application: str) -> None:
    """Ends a replica's process, as a lack of memory would."""
    for pid in cluster.state.pids():
        with contextlib.suppress(OSError):
            if (
                pathlib.Path(f"/proc/{pid}/cmdline")
                .read_bytes()
                .startswith(f"ray::ServeReplica:{application}:".encode())
            ):
                os.kill(pid, signal.SIGKILL)
                return


def train(cluster: LocalCluster, folder: pathlib.Path) -> subprocess.Popen[bytes]:
    """A few steps of the second stage, as a driver on the same Ray."""
    state = cluster.state
    changes = {"steps": 6, "log_every": 1, "checkpoint_every": 6, "samples_per_worker": 2, "output": folder / "out"}
    changes |= {"cluster.storage_path": folder / "runs", "name": "dashboard"}
    settings = itertools.chain.from_iterable(("--set", f"{name}={value}") for name, value in changes.items())
    command = [sys.executable, "training/finetune.py", "--config", "training/configs/tiny.yaml", *settings]
    env = cluster_environment(state, {"RAY_ADDRESS": f"127.0.0.1:{state.ports.gcs}"})
    with open(folder / "training.log", "wb") as log:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)


def ask_panels(prometheus: Prometheus, start: float, end: float) -> dict[str, list[tuple[str, str, list[Line]]]]:
    """For each panel's title, its queries: legend, unit, lines."""
    return {
        panel.title: [(q.legend, q.unit, prometheus.lines(q.expr, start, end)) for q in panel.queries]
        for panels in ROWS.values()
        for panel in panels
    }


def print_panels(drawn: dict[str, list[tuple[str, str, list[Line]]]]) -> list[str]:
    """Prints a line a query; returns those without data."""
    rows, empty = [], []
    for title, queries in drawn.items():
        for legend, unit, lines in queries:
            values = [value for _, points in lines for _, value in points]
            if values:
                span = f"{min(values):.4g} to {max(values):.4g}"
            else:
                span = "NO DATA"
                empty.append(f"{title}: {legend}")
            rows.append([title, legend, unit.removeprefix("suffix: "), str(len(lines)), str(len(values)), span])
    print_table(("panel", "legend", "unit", "series", "points", "values"), rows)
    return empty


def differing(prometheus: Prometheus, totals: collections.Counter[str]) -> list[str]:
    """Prints what clients were told beside what Prometheus has; returns what differs.

    Every request has the same picture and question, so a cancelled one that ran to its end all the same, which only the
    server knows, had the tokens of any other.
    """
    uncancelled = int(prometheus.value('sum(ray_focusllava_requests_total{outcome="ok"})')) - totals["requests"]
    print(f"cancelled requests that ran to their end: {uncancelled}")
    a_request = {name: amount // totals["requests"] for name, amount in totals.items()} | {"output_tokens": LONG}
    expected = {name: amount + max(0, uncancelled) * a_request[name] for name, amount in totals.items()}
    of = {
        "focusllava_converted_share_percent_count": "requests",
        "focusllava_output_tokens_total": "output_tokens",
        "focusllava_prompt_tokens_total": "prompt_tokens",
        **{f"focusllava_visual_tokens_{n}_total": f"visual_tokens_{n}" for n in ("uncompressed", "sampled", "kept")},
    }
    found = {name: (prometheus.value(f"sum(ray_{name})"), expected[total]) for name, total in of.items()}
    print_table(("total", "Prometheus", "clients"), [[n, f"{a:.0f}", f"{b:.0f}"] for n, (a, b) in found.items()])
    return [name for name, (a, b) in found.items() if a != b]


def never_seen(prometheus: Prometheus, rules: list[dict[str, Any]]) -> list[str]:
    """Metrics of alert rules that Prometheus has never scraped."""
    names = sorted({name for rule in rules for name in re.findall(r"\bray_\w+", rule["query"])})
    return [name for name in names if not prometheus.value(f"count(last_over_time({name}[1h]))")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150, help="of load")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--picture", type=pathlib.Path, help="draws some panels there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp, LocalCluster(grpc_port=0) as cluster:
        folder = pathlib.Path(temp)
        cluster.start()
        with Prometheus(cluster.state, folder) as prometheus:
            prometheus.wait()
            start, load = time.time(), Load(cluster, options.clients)
            training = train(cluster, folder)
            load.run(options.seconds / 2)
            print(f"{load.totals['requests']} answers; the language model's replica is killed", flush=True)
            load.lose_replica()
            load.run(options.seconds / 2)
            end = time.time() + SETTLE_S
            print(f"{load.totals['requests']} answers; training ended with {training.wait()}", flush=True)
            if training.returncode:
                print((folder / "training.log").read_text()[-2000:])
            time.sleep(SETTLE_S)
            drawn = ask_panels(prometheus, start, max(end, time.time()))
            empty = print_panels(drawn)
            wrong = differing(prometheus, load.totals)
            rules = prometheus.rules()
            print("alerts: " + ", ".join(f"{r['name']} {r['state']}" for r in rules if r["state"] != "inactive"))
            broken = [f"{r['name']}: {r.get('lastError')}" for r in rules if r["health"] != "ok"]
            unseen = never_seen(prometheus, rules)
            if options.picture:
                from benchmarks.dashboard_picture import draw

                draw(drawn, start, end, options.picture)
    faults = {"no data": empty, "another total": wrong, "a rule fails": broken, "a rule asks for what is not": unseen}
    for fault, cases in faults.items():
        for case in cases:
            print(f"{fault}: {case}")
    return 1 if any(faults.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
