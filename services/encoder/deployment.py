"""Stage 1 as a Ray Serve deployment: EncoderService at its own port and Serve's ingress, tiles of requests batched."""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import os
import time
from dataclasses import dataclass

import ray
import ray.serve.metrics
import torch
from ray import serve
from ray.serve.grpc_util import RayServegRPCContext

from focusllava.v1 import encoder_pb2, encoder_pb2_grpc
from services.checkpoint.sizing import default_tiles
from services.common import wire
from services.common.errors import InternalError
from services.common.grpc_status import check_fingerprint, refuse
from services.common.int8 import check_width, to_int8
from services.common.logs import log_event, set_request_id_from, set_up_logs
from services.common.port import StagePort
from services.common.shelf import Shelf
from services.common.telemetry import Metrics
from services.common.tracing import set_up_traces
from services.common.types import CompressedVisualTokens, ImageOptions
from services.compute.replica import Reporter, StageDeployment, gpu_part
from services.encoder.batcher import TileBatcher
from services.encoder.pipeline import EncoderPipeline
from services.encoder.settings import EncoderSettings


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """How a replica hands visual tokens over."""

    dtype: torch.dtype
    """The dtype that they are sent in; torch.int8 is with scales."""
    shelf: Shelf | None = None
    shelf_bytes: int = 0

    def is_near(self, shelf: str) -> bool:
        """Whether a caller with this shelf is on this node."""
        return self.shelf is not None and hmac.compare_digest(shelf.encode(), self.shelf.identity.encode())


def encode_response(
    tokens: CompressedVisualTokens, delivery: Delivery, claims: object = None
) -> encoder_pb2.EncodeResponse:
    """The response. Copies up to 48 MB: call it off an event loop.

    claims: all that decides the tokens, where the caller is on this node and they may be left on its shelf.

    NaN and infinity are sent: the LLM stage, which must look at every caller's tokens, refuses them.
    Raises InternalError where nothing is left to send.
    """
    if not tokens.tokens_ND.numel():
        raise InternalError("none is left of this image by the vision-guided sampler", field="visual tokens")
    response = encoder_pb2.EncodeResponse()
    sent = _in_dtype(tokens, delivery.dtype)
    if claims is not None and delivery.shelf is not None:
        name = delivery.shelf.name(claims)
        if wire.shelve(sent, delivery.shelf, name, delivery.shelf_bytes):
            response.visual_tokens.CopyFrom(wire.described(sent))
            response.visual_tokens.shelf_name = name
            return response
    wire.tokens_to_proto(sent, response.visual_tokens)
    return response


def _in_dtype(tokens: CompressedVisualTokens, dtype: torch.dtype) -> CompressedVisualTokens:
    if dtype is not torch.int8:
        return dataclasses.replace(tokens, tokens_ND=tokens.tokens_ND.to(dtype))
    tokens_ND, scales_NG = to_int8(tokens.tokens_ND)
    return dataclasses.replace(tokens, tokens_ND=tokens_ND, scales_NG=scales_NG)


@serve.deployment(name="Encoder")
class Encoder(StageDeployment):
    """One replica of stage 1; takes no LLM weight into memory."""

    def __init__(self, settings: EncoderSettings):
        set_up_logs(os.environ)
        set_up_traces(os.environ, "encoder")
        device, dtype = settings.place()
        gpu_part(device, lambda: ray.get_runtime_context().get_assigned_resources())
        self._pipeline = EncoderPipeline.from_checkpoint(
            settings.checkpoint,
            dtype=dtype,
            device=device,
            limits=settings.media,
        )
        if settings.wire_dtype == "int8":
            check_width(self._pipeline.config.text_config.hidden_size)
        self._computes_in = dtype
        self._delivery = Delivery(
            dtype=getattr(torch, settings.wire_dtype),
            shelf=Shelf.open() if settings.shelf_bytes else None,
            shelf_bytes=settings.shelf_bytes,
        )
        self._metrics = Metrics("encoder", ray.serve.metrics)
        self._batcher = TileBatcher(
            self._pipeline,
            max_tiles=settings.max_tiles or default_tiles(on_gpu=torch.device(device).type == "cuda"),
            max_wait_s=settings.max_wait_s,
            decode_threads=settings.decode_threads,
            on_batch=self._record_batch,
        )
        self._reporter = Reporter(self._report)
        self.host = ray.util.get_node_ip_address()
        self.port = StagePort(
            self,
            encoder_pb2_grpc.add_EncoderServiceServicer_to_server,
            lambda: serve.get_replica_context()._deployment_config,
            unlimited=("CheckEncoder",),
        )

    async def Encode(
        self, request: encoder_pb2.EncodeRequest, grpc_context: RayServegRPCContext
    ) -> encoder_pb2.EncodeResponse:
        """EncoderService.Encode."""
        received, outcome = time.monotonic(), "cancelled"
        facts: dict[str, int] = {}
        set_request_id_from(grpc_context)
        try:
            self.port.admit(grpc_context)
            check_fingerprint(request.model_fingerprint, self._pipeline.fingerprint)
            options = wire.image_options_from_proto(request.options)
            tokens = await self._batcher.encode(request.image, request.vision_sampler, options)
            claims = self._claims(tokens, request.vision_sampler, options)
            near = claims if self._delivery.is_near(request.shelf) else None
            response = await asyncio.to_thread(encode_response, tokens, self._delivery, near)
            outcome = "ok"
            facts = {"visual_tokens": len(tokens.tokens_ND), "uncompressed": tokens.uncompressed_tokens}
            self._record(request, tokens, response)
            return response
        except Exception as error:
            refused = refuse(grpc_context, error)
            outcome = refused.code.value
            raise refused from None
        finally:
            self._metrics.count("focusllava_encode_requests", outcome=outcome)
            self._metrics.observe("focusllava_encode_seconds", seconds := time.monotonic() - received)
            log_event("image encoded", outcome=outcome, seconds=round(seconds, 3), **facts)

    def _claims(self, tokens: CompressedVisualTokens, vision_sampler: bool, options: ImageOptions) -> object:
        """All that decides the visual tokens of an image."""
        dtypes = self._computes_in, self._delivery.dtype
        return tokens.content_hash, tokens.model_fingerprint, vision_sampler, options, dtypes

    async def CheckEncoder(
        self, request: encoder_pb2.CheckEncoderRequest, grpc_context: RayServegRPCContext
    ) -> encoder_pb2.CheckEncoderResponse:
        """EncoderService.CheckEncoder."""
        try:
            self.port.admit(grpc_context)
            check_fingerprint(request.model_fingerprint, self._pipeline.fingerprint)
            self.check_health()
            return encoder_pb2.CheckEncoderResponse()
        except Exception as error:
            raise refuse(grpc_context, error) from None

    def check_health(self) -> None:
        """Called by Serve, which replaces the replica where it raises."""
        self._reporter.check()

    def _record_batch(self, tiles: int) -> None:
        self._metrics.count("focusllava_encoded_tiles", tiles)
        self._metrics.observe("focusllava_tiles_per_batch", tiles)

    def _record(
        self,
        request: encoder_pb2.EncodeRequest,
        tokens: CompressedVisualTokens,
        response: encoder_pb2.EncodeResponse,
    ) -> None:
        self._metrics.count("focusllava_image_bytes_taken", len(request.image))
        if not response.visual_tokens.shelf_name:
            sent = wire.data_bytes(tuple(tokens.tokens_ND.shape), self._delivery.dtype)
            self._metrics.count("focusllava_visual_token_bytes_sent", sent)
        for branch, regions in enumerate(tokens.branch_ids_M.bincount().tolist()):
            self._metrics.count("focusllava_regions", regions, branch=str(branch))

    def work(self) -> dict[str, float]:
        """Tiles, those of calls that wait at the port included."""
        return {"focusllava_encoder_tiles": self._batcher.tiles(self.port.places.waiting)}

    def _report(self) -> None:
        for name, value in self.work().items():
            self._metrics.set(name, value)
        self._metrics.set("focusllava_encoder_waiting_images", self._batcher.waiting)
        self._metrics.set("focusllava_encoder_waiting_tiles", self._batcher.waiting_tiles)
        self._metrics.set("focusllava_encoder_calls", self.port.places.taken)
