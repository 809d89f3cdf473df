"""How many replicas a stage needs, by the work that waits for it and runs: policies for Ray Serve's autoscaler.

    policy: {policy_function: "cluster.autoscaling:EncoderPolicy", policy_kwargs: {tiles: 40}}

Serve's own policy counts requests, of which one may be a thousand times another, and only those that its router sends.
Here the replicas report their work themselves (`work` in `services/encoder/deployment.py` and
`services/llm/deployment.py`), under the names of their gauges, and a target says how much of it one replica is to have.
Serve calls a policy ten times a second with the means over `look_back_period_s`, and lays bounds, factors and delays of
the configuration over what it returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.serve.config import AutoscalingContext

Answer = tuple[float, dict[str, Any]]
"""Replicas that are wanted, and what the policy wants to be told next time: nothing."""


@dataclass(frozen=True, kw_only=True)
class EncoderPolicy:
    """Wants as many encoders as keep the tiles of each at `tiles`."""

    tiles: float = 40.0
    """Tiles that a replica is to have, in its batch and waiting; an encoder's tiles a second, times the seconds that an
    image may wait."""
    stale_s: float = 30.0
    """Age in seconds from which a replica's report is too old to scale down by. Replicas report every 10 s."""

    def __post_init__(self) -> None:
        _check(self.tiles > 0 and self.stale_s > 0, self)

    def __call__(self, context: AutoscalingContext) -> Answer:
        return replicas(context, {"focusllava_encoder_tiles": self.tiles}, self.stale_s), {}


@dataclass(frozen=True, kw_only=True)
class LanguageModelPolicy:
    """Wants as many language models as the scarcest of three needs: prefill, KV cache, places among the answers."""

    prefill_tokens: float = 8192.0
    """Prompt tokens that a replica is to have before it; its tokens a second in prefill, times the seconds that the
    first token may take."""
    kv_percent: float = 85.0
    """KV cache that a replica's requests are to have or wait for, of all that it has."""
    answers: float = 12.0
    """Answers that a replica is to give at a time, those that wait included; with more a token takes too long."""
    stale_s: float = 30.0
    """Age in seconds from which a replica's report is too old to scale down by. Replicas report every 10 s."""

    def __post_init__(self) -> None:
        _check(min(self.prefill_tokens, self.kv_percent, self.answers, self.stale_s) > 0, self)

    def __call__(self, context: AutoscalingContext) -> Answer:
        targets = {
            "focusllava_prefill_tokens_left": self.prefill_tokens,
            "focusllava_kv_percent_wanted": self.kv_percent,
            "focusllava_answers": self.answers,
        }
        return replicas(context, targets, self.stale_s), {}


def replicas(context: AutoscalingContext, targets: Mapping[str, float], stale_s: float) -> float:
    """Replicas among which no kind of work is more than its target each.

    What is not known holds: where no replica runs, or one has not reported for `stale_s`, no fewer are wanted than now.
    targets: by the name of the gauge, how much of it one replica is to have.
    """
    if not context.running_replicas:
        return context.target_num_replicas  # Serve itself starts the first one when a request waits
    means = context.aggregated_metrics or {}
    wanted = max(sum(means.get(name, {}).values()) / target for name, target in targets.items())
    if any(_age_s(context, replica, targets) > stale_s for replica in context.running_replicas):
        return max(wanted, context.target_num_replicas)
    return wanted


def _age_s(context: AutoscalingContext, replica: Any, names: Mapping[str, float]) -> float:
    """Seconds since the replica's last report of what it was to report; infinite where there is none."""
    series = [(context.raw_metrics or {}).get(name, {}).get(replica) for name in names]
    assert context.current_time is not None, "Serve says the time"
    return max(context.current_time - points[-1].timestamp if points else float("inf") for points in series)


def _check(holds: bool, policy: object) -> None:
    if not holds:
        raise ValueError(f"policy_kwargs: is {policy}, expected more than 0 of each")
