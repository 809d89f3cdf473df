"""How many replicas a stage needs: `policy: {policy_function: "cluster.autoscaling:by_ongoing_requests"}`.

Serve's own policy counts what its router sends. The gateways call the replicas' own ports, so the replicas count these
calls themselves (`services/compute/replica.py`) and Serve brings the counts here. Bounds, factors and delays of the
`autoscaling_config` hold as with any policy.
"""

from __future__ import annotations

from typing import Any

from ray.serve.config import AutoscalingContext

from services.common.port import ONGOING


def by_ongoing_requests(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Requests that run or wait, over what a replica is to have (`target_ongoing_requests`); and no state."""
    at_ports = (context.aggregated_metrics or {}).get(ONGOING, {})
    requests = context.total_num_requests + sum(at_ports.values())
    assert context.config is not None, "Serve asks a policy with the configuration that names it"
    return requests / context.config.get_target_ongoing_requests(), {}
