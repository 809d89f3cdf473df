"""Writes what the manifests take from elsewhere: `python -m cluster.kuberay`.

The Serve configuration comes from cluster/serve-a100.yaml, the alert rules from cluster/prometheus/alerts.yml.
"""

from __future__ import annotations

import pathlib
import textwrap
from typing import Any

import yaml

HERE = pathlib.Path(__file__).parent
SERVE_CONFIG = HERE.parent / "serve-a100.yaml"
ALERTS = HERE.parent / "prometheus" / "alerts.yml"
NETWORK = "NetworkPolicy serving (cluster/kuberay/network.yaml): Ray's pods reach each other, the proxy 9000 and 8000"
RULES = """\
# Written from cluster/prometheus/alerts.yml by `python -m cluster.kuberay`.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: focusllava
  labels: {release: prometheus} # what this Prometheus selects
spec:
"""


def serve_config() -> dict[str, Any]:
    """cluster/serve-a100.yaml, open to the pods' network, which a policy closes, and each application in its group."""
    config = yaml.safe_load(SERVE_CONFIG.read_text(encoding="utf8"))
    config["http_options"]["host"] = "0.0.0.0"
    for application in config["applications"]:
        if application["name"] == "gateway":
            application["args"]["network"] = NETWORK
        for deployment in application["deployments"]:
            deployment["ray_actor_options"]["label_selector"] = {"stage": application["name"]}
    return config


def with_block(text: str, key: str, block: str) -> str:
    """The text of a YAML file with another literal block under `key: |`."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.strip() == f"{key}: |")
    indent = len(lines[start]) - len(lines[start].lstrip())
    end = start + 1
    while end < len(lines) and (not lines[end].strip() or lines[end].startswith(" " * (indent + 1))):
        end += 1
    block = textwrap.indent(block.rstrip("\n"), " " * (indent + 2))
    return "\n".join([*lines[: start + 1], block, *lines[end:]]) + "\n"


def written() -> dict[str, str]:
    """Each file that is written, wholly or in part, and what it must hold."""
    service = (HERE / "rayservice.yaml").read_text(encoding="utf8")
    config = yaml.safe_dump(serve_config(), sort_keys=False, width=120)
    groups = ALERTS.read_text(encoding="utf8").partition("groups:")[2]
    return {
        "rayservice.yaml": with_block(service, "serveConfigV2", config),
        "alerts.yaml": RULES + textwrap.indent("groups:" + groups, "  "),
    }


if __name__ == "__main__":
    for name, text in written().items():
        (HERE / name).write_text(text, encoding="utf8")
