"""The metric table, what records by it, and the dashboard that draws it."""

from __future__ import annotations

import json
import pathlib
import re

import pytest

from services.common.telemetry import METRICS, Metrics

DASHBOARD = pathlib.Path(__file__).parents[3] / "cluster" / "grafana" / "focusllava.json"


class Recorder:
    """The three classes of `ray.util.metrics`, keeping what they were told."""

    def __init__(self):
        self.built: dict[str, tuple[str, tuple[str, ...]]] = {}
        self.calls: list[tuple[str, float, dict[str, str]]] = []

    def _kind(self, kind):
        recorder = self

        class Metric:
            def __init__(self, name, description, tag_keys, boundaries=None):
                assert description and (kind == "histogram") == bool(boundaries)
                recorder.built[name] = (kind, tag_keys)
                self.name = name

            def inc(self, value, tags):
                recorder.calls.append((self.name, value, tags))

            set = observe = inc

        return Metric

    Counter = property(lambda self: self._kind("counter"))
    Gauge = property(lambda self: self._kind("gauge"))
    Histogram = property(lambda self: self._kind("histogram"))


def expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def test_names_are_unique_and_prefixed_and_histograms_have_ascending_buckets():
    names = [spec.name for spec in METRICS]
    assert len(set(names)) == len(names)
    for spec in METRICS:
        assert re.fullmatch(r"focusllava_[a-z_]+", spec.name) and spec.unit and spec.description.endswith(".")
        assert list(spec.boundaries) == sorted(set(spec.boundaries))
        assert bool(spec.boundaries) == (spec.kind == "histogram")


def test_a_stage_builds_its_own_metrics_only():
    recorder = Recorder()
    Metrics("llm", recorder)
    assert set(recorder.built) == {spec.name for spec in METRICS if spec.stage == "llm"}


def test_records_and_skips_a_zero_count():
    recorder = Recorder()
    metrics = Metrics("gateway", recorder)
    metrics.count("focusllava_requests", outcome="ok")
    metrics.count("focusllava_output_tokens", 0)  # Ray refuses an increment of 0
    metrics.set("focusllava_cache_bytes", 0)
    metrics.observe("focusllava_request_seconds", 0.5)
    assert recorder.calls == [
        ("focusllava_requests", 1, {"outcome": "ok"}),
        ("focusllava_cache_bytes", 0, {}),
        ("focusllava_request_seconds", 0.5, {}),
    ]


@pytest.mark.parametrize("backend", [None, Recorder()])
def test_a_wrong_kind_tag_or_name_is_a_bug_even_without_a_backend(backend):
    metrics = Metrics("gateway", backend)
    with pytest.raises(AssertionError):
        metrics.set("focusllava_requests", 1, outcome="ok")
    with pytest.raises(AssertionError):
        metrics.count("focusllava_requests")
    with pytest.raises(KeyError):
        metrics.count("focusllava_kv_pages_used")


def prometheus_names(spec):
    """The names under which Ray's endpoint shows a metric."""
    endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
    return {f"ray_{spec.name}{ending}" for ending in endings[spec.kind]}


def test_the_dashboard_names_only_metrics_of_our_table_and_draws_every_one():
    """Ray's own names are checked at the live endpoint, in tests/integration/serving/test_public_api.py."""
    drawn = {name for text in expressions() for name in re.findall(r"ray_focusllava_[a-z_]+", text)}
    ours = {name for spec in METRICS for name in prometheus_names(spec)}
    assert drawn <= ours, drawn - ours
    for spec in METRICS:
        assert drawn & prometheus_names(spec), f"{spec.name} is on no panel"


def test_the_dashboard_draws_autoscaling():
    text = " ".join(expressions())
    for name in ("target_replicas", "total_requests", "target_ongoing_requests"):
        assert f"ray_serve_autoscaling_{name}" in text
