"""The Grafana dashboard as a table of panels: `python -m cluster.dashboard` writes cluster/grafana/focusllava.json.

Our metrics are named as in `services/common/telemetry.py`, from where a panel has its unit and its description. Two
habits of Ray's shape the queries: it forgets a gauge that nobody sets for some seconds, so the last value of half a
minute is taken; and it knows of a histogram's observations the buckets alone, so no mean is made of their sum.
"""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass
from typing import Any

from services.common.telemetry import METRICS, MetricSpec

FILE = pathlib.Path(__file__).parent / "grafana" / "focusllava.json"
COLUMNS, WIDTH, HEIGHT = 3, 8, 7
"""Panels in a line; width and height of one, in Grafana's grid of 24 columns."""
_SPECS = {spec.name: spec for spec in METRICS}
_UNITS = {"seconds": "s", "percent": "percent", "bytes": "bytes"}
_RATES = {"requests": "reqps", "bytes": "Bps"}


@dataclass(frozen=True)
class Query:
    """A line of a panel, or one for each value of the label that its legend names."""

    legend: str
    expr: str
    unit: str
    about: str = ""
    """What the metric is; panels show it as their description."""


@dataclass(frozen=True)
class Panel:
    title: str
    queries: tuple[Query, ...]


def panel(title: str, *queries: Query) -> Panel:
    return Panel(title, queries)


def now(name: str, legend: str) -> Query:
    """A gauge, over all replicas."""
    spec = _spec(name, "gauge")
    expr = f"sum(last_over_time(ray_{name}[30s]))"
    return Query(legend, expr, _UNITS.get(spec.unit, f"suffix: {spec.unit}"), spec.description)


def rate(name: str, legend: str = "", *, by: str = "") -> Query:
    """A total a second, over all replicas; by: a tag, each of whose values is a line."""
    spec = _spec(name, "counter", "gauge")
    total = f"ray_{name}_total" if spec.kind == "counter" else f"ray_{name}"
    grouped = f"sum by ({by})" if by else "sum"
    unit = _RATES.get(spec.unit, f"suffix: {spec.unit}/s")
    return Query(legend or f"{{{{{by}}}}}", f"{grouped} (rate({total}[$__rate_interval]))", unit, spec.description)


def total(name: str, *, by: str) -> Query:
    """A counter of what is rare, since the start: Ray has none before its first count, which no rate would show."""
    spec = _spec(name, "counter")
    return Query(f"{{{{{by}}}}}", f"sum by ({by}) (ray_{name}_total)", f"suffix: {spec.unit}", spec.description)


def percentile(name: str, percent: int) -> Query:
    """A percentile of a histogram's observations, over all replicas."""
    spec = _spec(name, "histogram")
    buckets = f"sum by (le) (rate(ray_{name}_bucket[$__rate_interval]))"
    expr = f"histogram_quantile({percent / 100}, {buckets})"
    return Query(f"p{percent}", expr, _UNITS.get(spec.unit, f"suffix: {spec.unit}"), spec.description)


def ratio(legend: str, part: str, whole: str) -> Query:
    """What a counter grows by for each of another's, or for each observation; in percent where the units are alike."""
    specs = [_spec(part, "counter"), _spec(whole, "counter", "histogram")]
    endings = {"counter": "total", "histogram": "count"}
    growth = [f"sum(rate(ray_{spec.name}_{endings[spec.kind]}[$__rate_interval]))" for spec in specs]
    expr, alike = " / ".join(growth), specs[0].unit == specs[1].unit and specs[1].kind == "counter"
    unit = "percent" if alike else f"suffix: {specs[0].unit}"
    return Query(legend, f"100 * {expr}" if alike else expr, unit, specs[0].description)


def share(name: str, legend: str, *, by: str, only: str = "") -> Query:
    """What one value of a tag, or each of them, is of a counter's growth, in percent."""
    spec = _spec(name, "counter")
    chosen = f'{{{by}="{only}"}}' if only else ""
    part = f"sum by ({by}) (rate(ray_{name}_total{chosen}[$__rate_interval]))"
    whole = f"sum(rate(ray_{name}_total[$__rate_interval]))"
    return Query(legend, f"100 * {part} / ignoring({by}) group_left {whole}", "percent", spec.description)


def serve(legend: str, aggregate: str, values: str) -> Query:
    """Values of one of Ray Serve's own metrics, a line for each deployment."""
    return Query(f"{{{{deployment}}}} {legend}".strip(), f"{aggregate} by (deployment) ({values})", "short")


def serve_now(legend: str, aggregate: str, name: str) -> Query:
    """One of Ray Serve's gauges, a line for each deployment."""
    return serve(legend, aggregate, f"last_over_time({name}[30s])")


def gateway_now(legend: str, name: str) -> Query:
    """One of Ray Serve's gauges, of the deployment that Serve scales by requests."""
    return Query(legend, f'max(last_over_time({name}{{deployment="Gateway"}}[30s]))', "short")


def calls_at_replicas(*names: str) -> Query:
    """What runs or waits at the stages' own ports, a line for each deployment."""
    specs = [_spec(name, "gauge") for name in names]
    values = " or ".join(f"last_over_time(ray_{spec.name}[30s])" for spec in specs)
    legend = "{{deployment}} running or waiting"
    return Query(legend, f"sum by (deployment) ({values})", f"suffix: {specs[0].unit}", specs[0].description)


def at_proxies(what: str) -> list[Query]:
    """A counter of Ray Serve's proxies a second, a line for each application and protocol."""
    total = "sum by (application) (rate(ray_serve_num_{}_{}_total[$__rate_interval]))"
    return [Query(f"{{{{application}}}} {each}", total.format(each, what), "reqps") for each in ("grpc", "http")]


def training(series: str) -> Query:
    """Lines of a training run's log."""
    spec = _spec("focusllava_training", "gauge")
    expr = f'last_over_time(ray_{spec.name}{{series=~"{series}"}}[10m])'
    return Query("{{run}} {{series}}", expr, "short", spec.description)


def _spec(name: str, *kinds: str) -> MetricSpec:
    spec = _SPECS[name]
    assert spec.kind in kinds, (name, spec.kind, kinds)
    return spec


def _latency(title: str, name: str) -> Panel:
    return panel(title, *(percentile(name, percent) for percent in (50, 95, 99)))


def _spread(title: str, name: str, *more: Query) -> Panel:
    return panel(title, *(percentile(name, percent) for percent in (10, 50, 90)), *more)


ROWS: dict[str, tuple[Panel, ...]] = {
    "What users see": (
        panel("Requests by outcome", rate("focusllava_requests", by="outcome")),
        _latency("Time to first token", "focusllava_time_to_first_token_seconds"),
        _latency("Time per output token", "focusllava_time_per_output_token_seconds"),
        _latency("Request latency", "focusllava_request_seconds"),
        panel("Requests being answered", now("focusllava_requests_in_flight", "in flight")),
        panel(
            "Tokens in and out", rate("focusllava_prompt_tokens", "prompt"), rate("focusllava_output_tokens", "output")
        ),
    ),
    "The gateway's door": (
        panel("Requests by key", rate("focusllava_requests", by="key")),
        panel("Output tokens by key", rate("focusllava_output_tokens", by="key")),
        panel("Waiting for a turn", now("focusllava_waiting_at_gateway", "requests")),
        panel("Tokens that wait for a turn", now("focusllava_waiting_tokens", "tokens, estimated")),
        panel("Tiles that wait for a turn", now("focusllava_waiting_tiles", "tiles, at most")),
        panel("Bytes of requests held", now("focusllava_held_bytes", "held")),
        panel("Compression in force", now("focusllava_compression_level", "level, summed over gateways")),
        panel(
            "Requests that the load compressed", rate("focusllava_requests_compressed", "level {{level}}", by="level")
        ),
    ),
    "Visual tokens": (
        panel(
            "Visual tokens in, and after each sampler",
            rate("focusllava_visual_tokens_uncompressed", "in"),
            rate("focusllava_visual_tokens_sampled", "after the vision-guided sampler"),
            rate("focusllava_visual_tokens_kept", "after the text-guided sampler"),
        ),
        _spread(
            "Share after the vision-guided sampler",
            "focusllava_sampled_share_percent",
            ratio("of all", "focusllava_visual_tokens_sampled", "focusllava_visual_tokens_uncompressed"),
        ),
        _spread(
            "Share after both samplers",
            "focusllava_kept_share_percent",
            ratio("of all", "focusllava_visual_tokens_kept", "focusllava_visual_tokens_uncompressed"),
        ),
        _spread("Converted share (Sec. 4.4)", "focusllava_converted_share_percent"),
        panel("Branches that regions choose", share("focusllava_regions", "branch {{branch}}", by="branch")),
        panel("Regions encoded", rate("focusllava_regions", "branch {{branch}}", by="branch")),
    ),
    "Between the stages": (
        panel(
            "Bytes between stages",
            rate("focusllava_image_bytes_taken", "images to the encoder"),
            rate("focusllava_visual_token_bytes_sent", "visual tokens from the encoder"),
            rate("focusllava_visual_token_bytes_taken", "visual tokens to the language model"),
        ),
        panel("Where calls go that belong to a replica", rate("focusllava_owned_calls", "to its {{to}}", by="to")),
        panel("Stage retries since the start", total("focusllava_stage_retries", by="stage")),
        panel("Cache look-ups", rate("focusllava_cache_lookups", by="result")),
        panel("Cache hits", share("focusllava_cache_lookups", "{{result}}", by="result", only="hit")),
        panel(
            "Cache traffic",
            rate("focusllava_cache_read_bytes", "read"),
            rate("focusllava_cache_written_bytes", "written"),
        ),
        panel("Cache size", now("focusllava_cache_bytes", "held in process")),
    ),
    "Encoder": (
        _latency("Encode latency", "focusllava_encode_seconds"),
        panel("Encode calls by outcome", rate("focusllava_encode_requests", by="outcome")),
        panel("Tiles encoded", rate("focusllava_encoded_tiles", "encoded")),
        panel(
            "Tiles a batch",
            ratio("mean", "focusllava_encoded_tiles", "focusllava_tiles_per_batch"),
            percentile("focusllava_tiles_per_batch", 95),
        ),
        panel("Tiles waiting for a batch", now("focusllava_encoder_waiting_tiles", "waiting")),
        panel("Images waiting for a batch", now("focusllava_encoder_waiting_images", "waiting")),
    ),
    "Language model": (
        _latency("Time to first token at the stage", "focusllava_llm_time_to_first_token_seconds"),
        panel("Generate calls by outcome", rate("focusllava_generate_requests", by="outcome")),
        panel(
            "Requests at the stage",
            now("focusllava_running_requests", "running"),
            now("focusllava_waiting_requests", "waiting"),
        ),
        panel(
            "KV cache pages",
            now("focusllava_kv_pages_used", "used"),
            now("focusllava_kv_pages_cached", "kept for reuse"),
            now("focusllava_kv_pages_total", "total"),
        ),
        panel("Preemptions", rate("focusllava_preemptions", "a second")),
        panel("Prompt tokens reused", rate("focusllava_prompt_tokens_reused", "reused")),
    ),
    "Autoscaling": (
        panel(
            "Replicas wanted and there",
            serve_now("wanted", "max", "ray_serve_autoscaling_target_replicas"),
            serve_now("healthy", "sum", "ray_serve_deployment_replica_healthy"),
        ),
        panel("Tiles that encoders have before them", now("focusllava_encoder_tiles", "encoded and waiting")),
        panel("Prompt tokens before the language model", now("focusllava_prefill_tokens_left", "to be prefilled")),
        panel("KV cache held and wanted", now("focusllava_kv_percent_wanted", "of one replica's, summed")),
        panel("Answers before the language model", now("focusllava_answers", "made and waiting")),
        panel(
            "The gateways' load against target",
            gateway_now("ongoing and queued, in Serve", "ray_serve_autoscaling_total_requests"),
            gateway_now("target a replica", "ray_serve_autoscaling_target_ongoing_requests"),
        ),
        panel("Calls at the stages' own ports", calls_at_replicas("focusllava_encoder_calls", "focusllava_llm_calls")),
        panel("Queued in Serve", serve_now("", "sum", "ray_serve_deployment_queued_queries")),
        panel("Replicas started since Serve was", serve("", "sum", "ray_serve_deployment_replica_starts_total")),
        panel("Requests at the proxies", *at_proxies("requests")),
        panel("Errors at the proxies", *at_proxies("error_requests")),
    ),
    "Training": (
        panel("Losses", training("train/(loss|language|balance)|validation/.*")),
        panel("Shares of branches and visual tokens", training("train/(branch_.*|.*_share)|speed/waiting_share")),
        panel("Tokens and samples a second", training("speed/(samples|.*tokens)")),
    ),
}
"""The panels of each row, by the row's title."""


def dashboard() -> dict[str, Any]:
    """What Grafana imports."""
    return {
        "title": "FocusLLaVA",
        "uid": "focusllava",
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "tags": ["focusllava", "ray"],
        "templating": {
            "list": [{"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}]
        },
        "panels": _panels(),
    }


def _panels() -> list[dict[str, Any]]:
    laid: list[dict[str, Any]] = []
    top = 0
    for title, panels in ROWS.items():
        row = {"type": "row", "title": title, "collapsed": False, "panels": []}
        laid.append({"id": len(laid) + 1, **row, "gridPos": {"h": 1, "w": 24, "x": 0, "y": top}})
        for index, each in enumerate(panels):
            place = {"x": index % COLUMNS * WIDTH, "y": top + 1 + index // COLUMNS * HEIGHT}
            laid.append({"id": len(laid) + 1, **_panel(each), "gridPos": {"h": HEIGHT, "w": WIDTH, **place}})
        top += 1 + -(-len(panels) // COLUMNS) * HEIGHT
    return laid


def _panel(each: Panel) -> dict[str, Any]:
    (unit,) = {query.unit for query in each.queries}  # one axis
    return {
        "type": "timeseries",
        "title": each.title,
        "description": " ".join(dict.fromkeys(query.about for query in each.queries if query.about)),
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "fieldConfig": {"defaults": {"unit": unit} | ({"min": 0} if unit != "short" else {}), "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + index), "expr": query.expr, "legendFormat": query.legend}
            for index, query in enumerate(each.queries)
        ],
    }


def text() -> str:
    """What the committed file holds."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf8")
