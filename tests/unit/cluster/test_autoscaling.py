"""The autoscaling policy counts what Serve routed and what came to the replicas' own ports."""

from __future__ import annotations

import pytest
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from cluster.autoscaling import by_ongoing_requests
from services.common.port import ONGOING


def context(routed: float, at_ports: dict | None) -> AutoscalingContext:
    return AutoscalingContext(
        deployment_id=None,
        deployment_name="LanguageModel",
        app_name="llm",
        current_num_replicas=2,
        target_num_replicas=2,
        running_replicas=[],
        total_num_requests=routed,
        total_queued_requests=0,
        aggregated_metrics=at_ports,
        raw_metrics=None,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=8,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=AutoscalingConfig(min_replicas=1, max_replicas=8, target_ongoing_requests=4),
    )


@pytest.mark.parametrize(
    "routed, at_ports, wanted",
    [
        (0, None, 0.0),
        (0, {ONGOING: {"a": 10.0, "b": 6.0}}, 4.0),
        (6, {ONGOING: {"a": 4.0}, "another": {"a": 99.0}}, 2.5),
        (8, {}, 2.0),
    ],
)
def test_replicas_follow_from_all_requests(routed, at_ports, wanted):
    assert by_ongoing_requests(context(routed, at_ports)) == (wanted, {})
