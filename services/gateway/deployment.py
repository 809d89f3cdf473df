"""The public door as a Ray Serve deployment: FocusService on Serve's gRPC ingress, OpenAI's API on its HTTP one.

client ~ gRPC or HTTP ~> Gateway ~ gRPC ~> encoder application
                                 ~ gRPC ~> llm application
"""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import re
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray.serve.metrics
from ray import serve
from ray.serve.grpc_util import RayServegRPCContext
from starlette.requests import Request
from starlette.responses import Response

from focusllava.v1 import focus_pb2
from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.store import fingerprint
from services.common.grpc_status import refuse
from services.common.settings import build_settings, require
from services.common.telemetry import Metrics
from services.gateway.admission import AdmissionLimits, request_id_of
from services.gateway.cache import CACHE_BYTES, VisualTokenCache, open_store
from services.gateway.chat import ChatService
from services.gateway.health import Health
from services.gateway.openai.http import HttpDoor
from services.gateway.stages import TIMEOUT_METADATA, Deadline, EncoderClient, LanguageModelClient, StageAddress


@dataclass(frozen=True, kw_only=True)
class GatewaySettings:
    """`args` of the gateway application."""

    checkpoint: str
    """Folder of the served checkpoint; only its configuration and fingerprint are read."""
    encoder: StageAddress = field(default_factory=lambda: StageAddress(application="encoder"))
    llm: StageAddress = field(default_factory=lambda: StageAddress(application="llm"))
    redis_url: str | None = None
    """Unset: the environment's REDIS_URL; with neither, a cache in this process."""
    redis_timeout_s: float = 0.25
    """Longest wait for Redis to give a value, up to 24 MB where the model has 8B. A longer one is a miss, and Redis is
    left alone until it answers a PING: raise it where the network is slow and encoding slower still."""
    redis_put_timeout_s: float = 5.0
    """Longest that storing a value may take. No request waits for it, and a failure has no other effect."""
    cache_bytes: int = CACHE_BYTES
    """Bound of the cache in this process."""
    cors_origins: tuple[str, ...] = ()
    """Sites whose pages may use the HTTP API, as in "https://example.org"; "*" is any. Unset: none."""
    max_model_len: int | None = None
    """The language model's setting of this name, for what the door says of the model."""
    limits: AdmissionLimits = field(default_factory=AdmissionLimits)
    """The `user_config` of the Serve configuration, where it sets one of them, has the last word."""

    def __post_init__(self) -> None:
        require(self.cache_bytes >= 0, "cache_bytes", self.cache_bytes, "0 or more")
        for index, origin in enumerate(self.cors_origins):
            known = origin == "*" or re.fullmatch(r"https?://[^/*]+", origin)
            require(bool(known), f"cors_origins[{index}]", origin, '"https://HOST", with a port if it has one, or "*"')
        for name in ("redis_timeout_s", "redis_put_timeout_s"):
            require(getattr(self, name) > 0, name, getattr(self, name), "more than 0 seconds")


@serve.deployment(name="Gateway")
class Gateway:
    """One replica of the public door."""

    def __init__(self, settings: GatewaySettings):
        metrics = Metrics("gateway", ray.serve.metrics)
        self._config = FocusLlavaConfig.load(settings.checkpoint)
        self._name = pathlib.Path(settings.checkpoint).name
        self._fingerprint = fingerprint(settings.checkpoint)
        redis_url = settings.redis_url or os.environ.get("REDIS_URL")
        store = open_store(
            redis_url,
            settings.cache_bytes,
            timeout_s=settings.redis_timeout_s,
            put_timeout_s=settings.redis_put_timeout_s,
        )
        self._cache = VisualTokenCache(store, metrics)
        encoder = EncoderClient(settings.encoder, self._fingerprint, metrics)
        language_model = LanguageModelClient(settings.llm, metrics)
        self._limits, self._max_model_len = settings.limits, settings.max_model_len
        self._service = ChatService(
            model_fingerprint=self._fingerprint,
            encoder=encoder,
            language_model=language_model,
            cache=self._cache,
            metrics=metrics,
            limits=settings.limits,
        )
        health = Health([encoder, language_model], self._fingerprint)
        self._http = HttpDoor(self._service, self._name, health, settings.cors_origins)

    async def __call__(self, request: Request) -> Response:
        """Any HTTP request. When the client goes, Serve cancels this, and with it the answer."""
        return await self._http.respond(request)

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """`user_config` of the Serve configuration: limits over those of `args.limits`, changed without a restart."""
        self._service.limits = build_settings(AdmissionLimits, user_config, "user_config.", over=self._limits)

    async def Chat(
        self, request: focus_pb2.ChatRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[focus_pb2.ChatResponse, None]:
        """FocusService.Chat."""
        request_id = request_id_of(request)
        events = self._service.chat(request, request_id, _deadline(grpc_context))
        try:
            async for event in events:
                yield event
        except Exception as error:
            raise refuse(grpc_context, error, request_id) from None
        finally:
            await events.aclose()

    async def GetModelInfo(
        self, request: focus_pb2.GetModelInfoRequest, grpc_context: RayServegRPCContext
    ) -> focus_pb2.GetModelInfoResponse:
        """FocusService.GetModelInfo."""
        try:
            return self._model_info()
        except Exception as error:
            raise refuse(grpc_context, error) from None

    def _model_info(self) -> focus_pb2.GetModelInfoResponse:
        config, text, limits = self._config, self._config.text_config, self._service.limits
        return focus_pb2.GetModelInfoResponse(
            name=self._name,
            model_fingerprint=self._fingerprint,
            text_family=config.text["model_type"],
            num_layers=text.num_hidden_layers,
            prune_layer=config.text_sampler.layer,
            prune_threshold=config.text_sampler.threshold,
            tile_px=config.tile_px,
            region_window=config.vision_sampler.window,
            max_context_tokens=self._max_model_len or text.max_position_embeddings,
            max_image_bytes=limits.media.max_bytes,
            max_images=limits.max_images,
            server_version=_version(),
        )


def _deadline(context: RayServegRPCContext) -> Deadline:
    return Deadline.said(dict(context.invocation_metadata()).get(TIMEOUT_METADATA))


def _version() -> str:
    try:
        return importlib.metadata.version("focusllava")
    except importlib.metadata.PackageNotFoundError:
        return "source tree"
