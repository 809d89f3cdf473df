"""Builders of the three Serve applications: `import_path: cluster.app:gateway` and so on in a Serve configuration.

Each imports its own stage only, so that a stage's process starts quickly and without the others' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from cluster.checks import check_network
from services.checkpoint.finding import find_checkpoint
from services.common.settings import build_settings


def gateway(args: Mapping[str, Any]) -> Application:
    """The public door; `args` as in GatewaySettings, and `network`: how the cluster's ports are closed to strangers."""
    from services.gateway.deployment import Gateway, GatewaySettings

    check_network(args.get("network"))
    settings = {name: value for name, value in args.items() if name != "network"}
    return Gateway.bind(build_settings(GatewaySettings, _with_checkpoint(settings)))  # type: ignore[attr-defined]


def encoder(args: Mapping[str, Any]) -> Application:
    """Stage 1; `args` as in EncoderSettings."""
    from services.encoder.settings import EncoderSettings

    settings = build_settings(EncoderSettings, _with_checkpoint(args))
    return _deployment("Encoder", "services.encoder.deployment.Encoder").bind(settings)


def llm(args: Mapping[str, Any]) -> Application:
    """Stage 2; `args` as in LanguageModelSettings."""
    from services.llm.settings import LanguageModelSettings

    settings = build_settings(LanguageModelSettings, _with_checkpoint(args))
    return _deployment("LanguageModel", "services.llm.deployment.LanguageModel").bind(settings)


def _deployment(name: str, path: str) -> Any:
    """A deployment whose class is imported by its replicas alone: with its model's code, that takes many seconds.

    Its request router tells the gateways of all its replicas.
    """
    listing: Any = "services.gateway.serve_replicas:ListingRouter"  # Ray's annotation of its own settings is wrong
    router = RequestRouterConfig(request_router_class=listing)
    deployment = serve.deployment(name=name, request_router_config=router)
    return deployment(path)  # type: ignore[arg-type]  # Ray takes an import path for a class


def _with_checkpoint(args: Mapping[str, Any]) -> dict[str, Any]:
    return {**args, "checkpoint": str(find_checkpoint(args.get("checkpoint")))}
