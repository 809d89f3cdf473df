"""Clusters that benchmarks start: one replica an application, and a second gateway beside the first."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import yaml

from cluster.local import SERVE_CONFIG

ONE_REPLICA: dict[str, Any] = {"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}}
CHANGED = "-changed"
"""How the names of the applications end that `--change` adds."""


def changed_config(change: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The Serve configuration with a second gateway, and a second one of each stage that has another setting."""
    config = yaml.safe_load(SERVE_CONFIG.read_text("utf8"))
    for application in list(config["applications"]):
        name = application["name"]
        if name not in (*change, "gateway"):
            continue
        added = copy.deepcopy(application)
        added.update(name=name + CHANGED, route_prefix=f"/{name}{CHANGED}")
        added["args"] = {**(added["args"] or {}), **change.get(name, {})}
        if name == "gateway":
            added["args"]["network"] = "loopback"
            for stage in change.keys() - {"gateway"}:
                added["args"][stage] = {"application": stage + CHANGED}
        config["applications"].append(added)
    return config
