"""The public door as a Ray Serve deployment: FocusService on Serve's gRPC ingress, OpenAI's API on its HTTP one.

client ~ gRPC or HTTP, Serve's proxy ~> Gateway ~ gRPC ~> a replica of the encoder application
                                                ~ gRPC ~> a replica of the llm application
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
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
from services.common.call_metadata import REQUEST_ID_HEADER, text_metadata
from services.common.foreign_methods import ForeignMethods
from services.common.grpc_status import refuse
from services.common.logs import LOGGER, set_up_logs
from services.common.settings import build_settings, require
from services.common.shelf import Shelf
from services.common.stage_secret import SECRET_VARIABLE, shared_secret
from services.common.telemetry import Metrics
from services.common.tracing import join_trace, set_up_traces
from services.gateway import playground
from services.gateway.admission import AdmissionLimits, ImageSizes, request_id_of
from services.gateway.cache import VisualTokenCache
from services.gateway.callers import Caller
from services.gateway.chat import ChatService
from services.gateway.compression import LoadCompression
from services.gateway.deadline import TIMEOUT_METADATA, Deadline
from services.gateway.health import Health
from services.gateway.keys import Keys
from services.gateway.openai.http import HttpDoor
from services.gateway.serve_replicas import ServeReplicas
from services.gateway.stages import EncoderClient, LanguageModelClient, StageAddress
from services.gateway.stores import CACHE_BYTES, open_store

_log = logging.getLogger(LOGGER)


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
    api_keys: str | None = None
    """A file of keys, without one of which nobody is answered. Unset: the environment's FOCUSLLAVA_API_KEYS_FILE, or
    FOCUSLLAVA_API_KEYS with what would stand in it; with none of them, everybody is."""
    playground: bool = True
    """Whether the HTTP port has a page at / on which a person asks about images."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that HTTP requests may call this server by, beside localhost, as in "focus.example.org". Unset: any, but
    for what comes over the loopback interface."""
    max_model_len: int | None = None
    """The language model's setting of this name, for what the door says of the model."""
    load_compression: LoadCompression | None = None
    """Tightens both samplers while requests wait for the language model; None never does."""
    limits: AdmissionLimits = field(default_factory=AdmissionLimits)
    """The `user_config` of the Serve configuration, where it sets one of them, has the last word."""

    def __post_init__(self) -> None:
        require(self.cache_bytes >= 0, "cache_bytes", self.cache_bytes, "0 or more")
        for index, origin in enumerate(self.cors_origins):
            known = origin == "*" or re.fullmatch(r"https?://[^/*]+", origin)
            require(bool(known), f"cors_origins[{index}]", origin, '"https://HOST", with a port if it has one, or "*"')
        for index, host in enumerate(self.allowed_hosts):
            known = re.fullmatch(r"[a-z0-9_.-]+|[0-9a-f:]+", host)
            require(bool(known), f"allowed_hosts[{index}]", host, "a name in small letters, without scheme and port")
        for name in ("redis_timeout_s", "redis_put_timeout_s"):
            require(getattr(self, name) > 0, name, getattr(self, name), "more than 0 seconds")


@serve.deployment(name="Gateway")
class Gateway(ForeignMethods):
    """One replica of the public door."""

    def __init__(self, settings: GatewaySettings):
        set_up_logs(os.environ)
        set_up_traces(os.environ, "gateway")
        metrics = Metrics("gateway", ray.serve.metrics)
        for name, address in (("encoder", settings.encoder), ("llm", settings.llm)):
            known = address.target is None or shared_secret(os.environ)
            require(bool(known), f"{name}.target", address.target, f"{SECRET_VARIABLE} to be set here as it is there")
        self._config = FocusLlavaConfig.load(settings.checkpoint)
        if settings.load_compression is not None:
            settings.load_compression.check(self._config)
        self._name = pathlib.Path(settings.checkpoint).name
        self._fingerprint = fingerprint(settings.checkpoint)
        redis_url = settings.redis_url or os.environ.get("REDIS_URL")
        store = open_store(
            redis_url,
            settings.cache_bytes,
            timeout_s=settings.redis_timeout_s,
            put_timeout_s=settings.redis_put_timeout_s,
        )
        shelf = Shelf.open()
        self._cache = VisualTokenCache(store, metrics, shelf)
        encoders = ServeReplicas("Encoder", settings.encoder.application)
        models = ServeReplicas("LanguageModel", settings.llm.application)
        encoder = EncoderClient(settings.encoder, self._fingerprint, metrics, encoders, shelf)
        language_model = LanguageModelClient(settings.llm, metrics, models, shelf)
        self._limits = settings.limits
        self._max_model_len = settings.max_model_len or self._config.text_config.max_position_embeddings
        self._keys = Keys.configured(settings.api_keys, os.environ, metrics)
        self._service = ChatService(
            model_fingerprint=self._fingerprint,
            config=self._config,
            encoder=encoder,
            language_model=language_model,
            cache=self._cache,
            metrics=metrics,
            limits=settings.limits,
            image_sizes=_image_sizes(self._config),
            load_compression=settings.load_compression,
        )
        health = Health([encoder, language_model], self._fingerprint)
        self._http = HttpDoor(
            self._service,
            health,
            self._keys,
            model=self._name,
            max_model_len=self._max_model_len,
            samplers=_samplers(self._config),
            page=playground.assets() if settings.playground else None,
            cors_origins=settings.cors_origins,
            allowed_hosts=settings.allowed_hosts,
        )

    async def __call__(self, request: Request) -> Response:
        """Any HTTP request. When the client goes, Serve cancels this, and with it the answer."""
        return await self._http.respond(request)

    def check_health(self) -> None:
        """Called by Serve every few seconds: the moment to set gauges, of which Ray forgets what nobody sets."""
        self._service.report()
        self._cache.report()

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """`user_config` of the Serve configuration: limits over those of `args.limits`, changed without a restart."""
        self._service.limits = build_settings(AdmissionLimits, user_config, "user_config.", over=self._limits)

    async def Chat(
        self, request: focus_pb2.ChatRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[focus_pb2.ChatResponse, None]:
        """FocusService.Chat."""
        join_trace(text_metadata(grpc_context))
        request_id = request_id_of(request, _said(grpc_context, REQUEST_ID_HEADER))
        grpc_context.set_trailing_metadata([(REQUEST_ID_HEADER, request_id)])
        try:
            caller = self._caller(grpc_context)
            events = self._service.chat(request, request_id, _deadline(grpc_context), caller)
            async with contextlib.aclosing(events):
                async for event in events:
                    yield event
        except Exception as error:
            raise refuse(grpc_context, error, request_id) from None

    async def GetModelInfo(
        self, request: focus_pb2.GetModelInfoRequest, grpc_context: RayServegRPCContext
    ) -> focus_pb2.GetModelInfoResponse:
        """FocusService.GetModelInfo."""
        try:
            self._caller(grpc_context)
            return self._model_info()
        except Exception as error:
            raise refuse(grpc_context, error) from None

    def _caller(self, context: RayServegRPCContext) -> Caller:
        return self._keys.caller(_said(context, "authorization"))

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
            max_context_tokens=self._max_model_len,
            max_image_bytes=limits.media.max_bytes,
            max_images=limits.max_images,
            server_version=_version(),
        )


def _image_sizes(config: FocusLlavaConfig) -> ImageSizes:
    """One tile of the whole image, and those of the largest grid."""
    grid = max(height * width for height, width in config.image_grid_pinpoints) // config.tile_px**2
    return ImageSizes(tiles=1 + grid, tile_tokens=config.patches_per_side**2)


def _samplers(config: FocusLlavaConfig) -> dict[str, Any]:
    """What both samplers do where a request does not say."""
    vision, text = config.vision_sampler, config.text_sampler
    return {
        "vision_sampler": vision.enabled,
        "text_sampler": text.enabled,
        "threshold": text.threshold,
        "prune_layer": text.layer,
        "num_layers": config.text_config.num_hidden_layers,
    }


def _deadline(context: RayServegRPCContext) -> Deadline:
    return Deadline.said(_said(context, TIMEOUT_METADATA) or None)


def _said(context: RayServegRPCContext, name: str) -> str:
    """The caller's metadata of this name; empty where there is none."""
    return text_metadata(context).get(name, "")


def _version() -> str:
    try:
        return importlib.metadata.version("focusllava")
    except importlib.metadata.PackageNotFoundError:
        return "source tree"
