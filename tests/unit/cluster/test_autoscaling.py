"""The policies want replicas by the work that these report, and hold where a report is missing or old."""

from __future__ import annotations

import dataclasses
import types

import pytest
from ray import cloudpickle
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from cluster.autoscaling import EncoderPolicy, LanguageModelPolicy
from services.common.telemetry import METRICS

NOW = 1000.0
ENCODER, MODEL = EncoderPolicy(tiles=40), LanguageModelPolicy(prefill_tokens=8000, kv_percent=80, answers=10)
TILES, PREFILL, KV, ANSWERS = (
    "focusllava_encoder_tiles", "focusllava_prefill_tokens_left", "focusllava_kv_percent_wanted", "focusllava_answers"
)  # fmt: skip
IDLE = {PREFILL: 0.0, KV: 0.0, ANSWERS: 0.0}


def context(*reports: dict[str, float] | None, age_s: float = 1.0, target: int | None = None, **config):
    """What Serve tells a policy of replicas that reported so; None: one that runs and has not reported."""
    means, series = {}, {}
    for replica, report in enumerate(reports):
        for name, value in (report or {}).items():
            means.setdefault(name, {})[replica] = value
            series.setdefault(name, {})[replica] = [types.SimpleNamespace(timestamp=NOW - age_s, value=value)]
    return AutoscalingContext(
        deployment_id=None,
        deployment_name="LanguageModel",
        app_name="llm",
        current_num_replicas=len(reports),
        target_num_replicas=len(reports) if target is None else target,
        running_replicas=list(range(len(reports))),
        total_num_requests=0,
        total_queued_requests=0,
        aggregated_metrics=lambda: means,
        raw_metrics=lambda: series,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=8,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=NOW,
        config=AutoscalingConfig(min_replicas=0, max_replicas=8, **config),
    )


@pytest.mark.parametrize("tiles, wanted", [((0,), 0), ((40,), 1), ((41,), 1.025), ((100, 20), 3), ((0, 0, 0), 0)])
def test_encoders_follow_from_their_tiles(tiles, wanted):
    assert ENCODER(context(*({TILES: count} for count in tiles))) == (pytest.approx(wanted), {})


@pytest.mark.parametrize(
    "reports, wanted",
    [
        ([IDLE], 0),
        ([IDLE | {PREFILL: 16000}], 2),
        ([IDLE | {KV: 120}, IDLE | {KV: 40}], 2),
        ([IDLE | {ANSWERS: 25}], 2.5),
        ([{PREFILL: 4000, KV: 200, ANSWERS: 10}], 2.5),  # the scarcest of the three
    ],
)
def test_language_models_follow_from_what_is_scarcest(reports, wanted):
    assert MODEL(context(*reports)) == (pytest.approx(wanted), {})


@pytest.mark.parametrize("reports", [(None,), ({TILES: 1}, None), ()])
def test_what_is_not_known_is_no_reason_to_scale_down(reports):
    assert ENCODER(context(*reports, target=3)) == (3, {})


def test_an_old_report_is_no_reason_to_scale_down_and_still_one_to_scale_up():
    policy = dataclasses.replace(ENCODER, stale_s=30)
    for age_s, tiles, wanted in ((29, 20, 0.5), (31, 20, 2), (31, 160, 4)):
        assert policy(context({TILES: tiles}, {TILES: 0}, age_s=age_s)) == (pytest.approx(wanted), {})


def test_part_of_a_report_is_not_enough():
    assert MODEL(context({ANSWERS: 1}, target=2)) == (2, {})


def test_none_runs_and_none_is_wanted_until_serve_hears_of_a_request():
    asleep = context(target=0)
    assert ENCODER(asleep) == (0, {})
    as_serve_asks = _apply_autoscaling_config(ENCODER)
    assert as_serve_asks(asleep)[0] == 0
    asleep._total_num_requests_value = 1
    del asleep.total_num_requests  # it was worked out once
    assert as_serve_asks(asleep)[0] == 1


def test_serves_delays_and_bounds_are_laid_over_a_policy():
    ask = _apply_autoscaling_config(ENCODER)
    at_once = context({TILES: 100}, upscale_delay_s=0)
    assert ask(at_once)[0] == 3
    assert ask(context({TILES: 100}, upscale_delay_s=10))[0] == 1
    assert ask(context({TILES: 1}, {TILES: 1}, downscale_delay_s=0))[0] == 1
    assert ask(context({TILES: 0}, downscale_delay_s=600, downscale_to_zero_delay_s=0))[0] == 0


def test_the_policies_read_gauges_that_the_dashboard_shows():
    gauges = {spec.name for spec in METRICS if spec.kind == "gauge"}
    assert {TILES, PREFILL, KV, ANSWERS} <= gauges


@pytest.mark.parametrize("kind, wrong", [(EncoderPolicy, "tiles"), (LanguageModelPolicy, "answers")])
def test_a_target_of_nothing_is_refused(kind, wrong):
    with pytest.raises(ValueError, match=rf"policy_kwargs: is .*{wrong}=0.*, expected more than 0 of each"):
        kind(**{wrong: 0})


def test_serve_takes_a_policy_by_name_and_by_value():
    said = {"policy_function": "cluster.autoscaling:LanguageModelPolicy", "policy_kwargs": {"answers": 3}}
    policy = AutoscalingConfig(policy=said).policy
    there = cloudpickle.loads(policy.get_serialized_policy_def())(**policy.policy_kwargs)
    assert there(context(IDLE | {ANSWERS: 9})) == (pytest.approx(3), {})
