"""A real Prometheus (Debian: apt-get install prometheus) that scrapes one local cluster, with our alert rules."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from typing import Any, Self

import yaml

from cluster.checks import ClusterError, free_ports
from cluster.ray_head import ClusterState

CONFIG = pathlib.Path(__file__).resolve().parent.parent / "cluster" / "prometheus" / "prometheus.yml"
SCRAPE_S = 3
INTERVAL = "20s"
"""Grafana's `$__rate_interval`, for scrapes this frequent."""

Line = tuple[dict[str, str], list[tuple[float, float]]]
"""Labels of a series, and its points (Unix time, value)."""


class Prometheus:
    """The server, on the loopback interface; a context manager, at whose end it is stopped."""

    def __init__(self, state: ClusterState, folder: pathlib.Path):
        """folder: where its configuration and its data go."""
        if not shutil.which("prometheus"):
            raise ClusterError("prometheus is not installed: apt-get install prometheus")
        config = yaml.safe_load(CONFIG.read_text())
        config["global"] = {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"}
        config["rule_files"] = [str(CONFIG.parent / name) for name in config["rule_files"]]
        (scraped,) = config["scrape_configs"]
        (found_by,) = scraped["file_sd_configs"]
        found_by["files"] = [str(state.ray_dir / pathlib.Path(name).name) for name in found_by["files"]]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._folder, self._address = folder, f"127.0.0.1:{free_ports().grpc}"

    def __enter__(self) -> Self:
        options = {
            "config.file": self._folder / "prometheus.yml",
            "storage.tsdb.path": self._folder / "data",
            "web.listen-address": self._address,
            "log.level": "warn",
        }
        with open(self._folder / "prometheus.log", "wb") as log:
            command = ["prometheus", *(f"--{name}={value}" for name, value in options.items())]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def wait(self, seconds: float = 60) -> None:
        """Returns once it has scraped the cluster. Raises ClusterError with the end of its log."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._process.poll() is None:
            try:
                if self.value('sum(up{job="ray"})'):
                    return
            except OSError:
                pass
            time.sleep(0.5)
        log = (self._folder / "prometheus.log").read_text().strip()[-500:]
        raise ClusterError(f"Prometheus has not scraped the cluster within {seconds:.0f} s: {log}")

    def value(self, expr: str) -> float:
        """The one value of an expression now; 0 where there is none."""
        found = self._get("query", query=expr)["result"]
        return float(found[0]["value"][1]) if found else 0.0

    def lines(self, expr: str, start: float, end: float) -> list[Line]:
        """The series of a panel's query from `start` to `end` (Unix time), without points that are not numbers."""
        expr = expr.replace("$__rate_interval", INTERVAL)
        found = self._get("query_range", query=expr, start=start, end=end, step=SCRAPE_S)["result"]
        lines = [(each["metric"], [(float(at), float(value)) for at, value in each["values"]]) for each in found]
        return [(labels, [p for p in points if p[1] == p[1]]) for labels, points in lines]

    def rules(self) -> list[dict[str, Any]]:
        """The alert rules, with `health`, `state` and `lastError`."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def _get(self, what: str, **arguments: Any) -> dict[str, Any]:
        url = f"http://{self._address}/api/v1/{what}?{urllib.parse.urlencode(arguments)}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # ignores the environment's proxy
        with opener.open(url, timeout=30) as response:
            return json.load(response)["data"]
