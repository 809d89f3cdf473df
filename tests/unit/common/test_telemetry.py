"""The metric table, and what records by it."""

from __future__ import annotations

import re

import pytest

from services.common.telemetry import METRICS, Metrics


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
    metrics.count("focusllava_requests", outcome="ok", key="a")
    metrics.count("focusllava_output_tokens", 0, key="a")  # Ray refuses an increment of 0
    metrics.set("focusllava_cache_bytes", 0)
    metrics.observe("focusllava_request_seconds", 0.5)
    assert recorder.calls == [
        ("focusllava_requests", 1, {"outcome": "ok", "key": "a"}),
        ("focusllava_cache_bytes", 0, {}),
        ("focusllava_request_seconds", 0.5, {}),
    ]


@pytest.mark.parametrize("backend", [None, Recorder()])
def test_a_wrong_kind_tag_or_name_is_a_bug_even_without_a_backend(backend):
    metrics = Metrics("gateway", backend)
    with pytest.raises(AssertionError):
        metrics.set("focusllava_requests", 1, outcome="ok", key="a")
    with pytest.raises(AssertionError):
        metrics.count("focusllava_requests")
    with pytest.raises(KeyError):
        metrics.count("focusllava_kv_pages_used")
