"""Every metric's name, kind, unit and tags in one table, and `Metrics`, which records only what the table has.

Ray prefixes each name with `ray_`, counters get `_total`, and Serve adds the tags deployment, replica and application.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

Stage = Literal["gateway", "encoder", "llm", "training"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_SECONDS = (0.002, 0.004, 0.006, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)
_TILES = (1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 16.0, 24.0, 32.0, 40.0, 64.0)
_PERCENT = tuple(5.0 * step for step in range(1, 21))


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """One metric, as the stage that owns it records it."""

    name: str
    stage: Stage
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    description: str
    tags: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()
    """Histogram buckets, in the unit."""


def _counter(stage: Stage, name: str, unit: str, description: str, *tags: str) -> MetricSpec:
    return MetricSpec(name=name, stage=stage, kind="counter", unit=unit, description=description, tags=tags)


def _gauge(stage: Stage, name: str, unit: str, description: str) -> MetricSpec:
    return MetricSpec(name=name, stage=stage, kind="gauge", unit=unit, description=description)


def _histogram(stage: Stage, name: str, unit: str, description: str, boundaries: tuple[float, ...]) -> MetricSpec:
    return MetricSpec(
        name=name, stage=stage, kind="histogram", unit=unit, description=description, boundaries=boundaries
    )


METRICS: tuple[MetricSpec, ...] = (
    _counter("gateway", "focusllava_requests", "requests",
             "Chat requests ended. outcome: ok, cancelled, or the name of the gRPC status. key: the holder's name.",
             "outcome", "key"),
    _gauge("gateway", "focusllava_requests_in_flight", "requests", "Chat requests being answered."),
    _histogram("gateway", "focusllava_request_seconds", "seconds", "Receipt to last event.", _SECONDS),
    _histogram("gateway", "focusllava_time_to_first_token_seconds", "seconds", "Receipt to first token.", _SECONDS),
    _histogram("gateway", "focusllava_time_per_output_token_seconds", "seconds",
               "Mean time of an answer's tokens after the first.", _TOKEN_SECONDS),
    _counter("gateway", "focusllava_prompt_tokens", "tokens", "Text and visual tokens that entered the first layer."),
    _gauge("gateway", "focusllava_waiting_at_gateway", "requests", "Chat requests that wait for their turn."),
    _gauge("gateway", "focusllava_waiting_tokens", "tokens", "Their tokens, estimated, answers included."),
    _gauge("gateway", "focusllava_waiting_tiles", "tiles", "The tiles of their images, at most."),
    _gauge("gateway", "focusllava_held_bytes", "bytes", "Bytes of bodies being read and of requests under way."),
    _counter("gateway", "focusllava_output_tokens", "tokens", "Tokens generated. key: the holder's name.", "key"),
    _counter("gateway", "focusllava_visual_tokens_uncompressed", "tokens", "Visual tokens, both samplers off."),
    _counter("gateway", "focusllava_visual_tokens_sampled", "tokens", "Visual tokens after the vision-guided sampler."),
    _counter("gateway", "focusllava_visual_tokens_kept", "tokens", "Visual tokens after the text-guided sampler."),
    _histogram("gateway", "focusllava_sampled_share_percent", "percent",
               "Visual tokens after the vision-guided sampler of the uncompressed count, a request with images.",
               _PERCENT),
    _histogram("gateway", "focusllava_kept_share_percent", "percent",
               "Visual tokens after both samplers of the uncompressed count, a request with images.", _PERCENT),
    _histogram("gateway", "focusllava_converted_share_percent", "percent",
               "Converted remaining tokens of the uncompressed count, a request with images.", _PERCENT),
    _gauge("gateway", "focusllava_compression_level", "level",
           "How far the load tightens the samplers, 0 not at all; for requests that name no sampler setting."),
    _counter("gateway", "focusllava_requests_compressed", "requests",
             "Chat requests whose samplers the load tightened, by level.", "level"),
    _counter("gateway", "focusllava_cache_lookups", "lookups",
             "Visual-token cache look-ups. result: hit, miss, error (a failing Redis; served as a miss).", "result"),
    _gauge("gateway", "focusllava_cache_bytes", "bytes", "Bytes held by the in-process cache; 0 with Redis."),
    _counter("gateway", "focusllava_cache_read_bytes", "bytes", "Bytes of visual tokens that the cache gave."),
    _counter("gateway", "focusllava_cache_written_bytes", "bytes", "Bytes of visual tokens stored in the cache."),
    _counter("gateway", "focusllava_stage_retries", "retries", "Calls to a stage tried again.", "stage"),
    _counter("gateway", "focusllava_owned_calls", "calls",
             "Calls of the language model whose prompt begins with what belongs to one of several replicas. to: owner, "
             "or next (the owner was busy, full or lost).", "to"),
    _counter("encoder", "focusllava_encode_requests", "requests", "Encode calls ended.", "outcome"),
    _histogram("encoder", "focusllava_encode_seconds", "seconds", "Receipt of an image to its tokens.", _SECONDS),
    _counter("encoder", "focusllava_encoded_tiles", "tiles", "Tiles that went through the vision tower."),
    _histogram("encoder", "focusllava_tiles_per_batch", "tiles", "Tiles that went through the vision tower together.",
               _TILES),
    _gauge("encoder", "focusllava_encoder_waiting_images", "images", "Images decoded and waiting for a batch."),
    _gauge("encoder", "focusllava_encoder_waiting_tiles", "tiles",
           "Tiles of those images; no more are decoded than for two batches."),
    _gauge("encoder", "focusllava_encoder_tiles", "tiles",
           "Tiles encoded now and waiting, those of images not decoded yet estimated; encoders are scaled by it."),
    _counter("encoder", "focusllava_regions", "regions",
             "Regions of encoded images by the branch chosen, in the order of `vision_sampler.branches`.", "branch"),
    _counter("encoder", "focusllava_image_bytes_taken", "bytes", "Bytes of image files that the encoder was sent."),
    _counter("encoder", "focusllava_visual_token_bytes_sent", "bytes", "Bytes of visual tokens that the encoder sent."),
    _counter("llm", "focusllava_visual_token_bytes_taken", "bytes",
             "Bytes of visual tokens that the language model was sent."),
    _gauge("encoder", "focusllava_encoder_calls", "calls", "Calls at the replica's own port that run or wait."),
    _counter("llm", "focusllava_generate_requests", "requests", "Generate calls ended.", "outcome"),
    _histogram("llm", "focusllava_llm_time_to_first_token_seconds", "seconds", "Receipt at the stage to first token.",
               _SECONDS),
    _gauge("llm", "focusllava_running_requests", "requests", "Requests that hold KV cache."),
    _gauge("llm", "focusllava_waiting_requests", "requests", "Requests waiting for KV cache."),
    _gauge("llm", "focusllava_llm_calls", "calls", "Calls at the replica's own port that run or wait."),
    _gauge("llm", "focusllava_prefill_tokens_left", "tokens",
           "Prompt tokens still to be prefilled, each counted by the share of the layers before it; language models "
           "are scaled by it."),
    _gauge("llm", "focusllava_kv_percent_wanted", "percent",
           "KV cache that requests hold and that waiting prompts would take, of a replica's; language models are "
           "scaled by it."),
    _gauge("llm", "focusllava_answers", "answers",
           "Answers being made and waiting; language models are scaled by it."),
    _gauge("llm", "focusllava_kv_pages_used", "pages", "KV cache pages in use, both groups."),
    _gauge("llm", "focusllava_kv_pages_cached", "pages",
           "KV cache pages that no request holds, kept for prompts with the same beginning."),
    _gauge("llm", "focusllava_kv_pages_total", "pages", "KV cache pages, both groups."),
    # Totals as gauges: Ray shows no counter before its first count, and a panel is to say that nothing was preempted.
    _gauge("llm", "focusllava_preemptions", "preemptions",
           "Requests that gave their KV cache back to older ones, since the replica started."),
    _gauge("llm", "focusllava_prompt_tokens_reused", "tokens",
           "Prompt tokens whose lower layers an earlier request had computed, since the replica started."),
    MetricSpec(name="focusllava_training", stage="training", kind="gauge", unit="that of the value",
               description="What the log of a training run shows, by its name there.", tags=("run", "series")),
)  # fmt: skip


class MetricBackend(Protocol):
    """What `ray.util.metrics` and `ray.serve.metrics` offer."""

    Counter: Any
    Gauge: Any
    Histogram: Any


class Metrics:
    """Records one stage's metrics. A name, kind or tag that the table lacks is a bug and fails an assert.

    backend is a module such as `ray.serve.metrics`; None records nothing (one process, no endpoint).
    """

    def __init__(self, stage: Stage, backend: MetricBackend | None = None):
        self._specs = {spec.name: spec for spec in METRICS if spec.stage == stage}
        self._live = {name: _build(spec, backend) for name, spec in self._specs.items()} if backend else {}

    def count(self, name: str, amount: float = 1, **tags: str) -> None:
        self._check(name, "counter", tags)
        if amount > 0 and self._live:
            self._live[name].inc(amount, tags=tags)

    def set(self, name: str, value: float, **tags: str) -> None:
        self._check(name, "gauge", tags)
        if self._live:
            self._live[name].set(value, tags=tags)

    def observe(self, name: str, value: float, **tags: str) -> None:
        self._check(name, "histogram", tags)
        if self._live:
            self._live[name].observe(value, tags=tags)

    def _check(self, name: str, kind: str, tags: dict[str, str]) -> None:
        spec = self._specs[name]
        assert spec.kind == kind and set(tags) == set(spec.tags), (name, kind, tags)


def _build(spec: MetricSpec, backend: MetricBackend) -> Any:
    text = f"{spec.description} Unit: {spec.unit}."
    if spec.kind == "counter":
        return backend.Counter(spec.name, description=text, tag_keys=spec.tags)
    if spec.kind == "gauge":
        return backend.Gauge(spec.name, description=text, tag_keys=spec.tags)
    return backend.Histogram(spec.name, description=text, boundaries=list(spec.boundaries), tag_keys=spec.tags)
