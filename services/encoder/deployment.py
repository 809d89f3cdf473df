"""Stage 1 as a Ray Serve deployment: EncoderService over Serve's gRPC ingress, tiles batched across requests."""

from __future__ import annotations

import asyncio
import dataclasses
import time

import ray
import ray.serve.metrics
import torch
from ray import serve
from ray.serve.grpc_util import RayServegRPCContext

from focusllava.v1 import encoder_pb2
from services.checkpoint.sizing import default_tiles
from services.common import wire
from services.common.errors import InternalError
from services.common.grpc_status import check_fingerprint, refuse
from services.common.telemetry import Metrics
from services.common.types import CompressedVisualTokens
from services.compute.replica import GrpcOnly, Reporter, gpu_part
from services.encoder.batcher import TileBatcher
from services.encoder.pipeline import EncoderPipeline
from services.encoder.settings import EncoderSettings


def encode_response(tokens: CompressedVisualTokens, dtype: torch.dtype) -> encoder_pb2.EncodeResponse:
    """The response, its visual tokens in `dtype`. Copies up to 48 MB: call it off an event loop.

    NaN and infinity are sent: the LLM stage, which must look at every caller's tokens, refuses them.
    Raises InternalError where nothing is left to send.
    """
    if not tokens.tokens_ND.numel():
        raise InternalError("none is left of this image by the vision-guided sampler", field="visual tokens")
    response = encoder_pb2.EncodeResponse()
    wire.tokens_to_proto(dataclasses.replace(tokens, tokens_ND=tokens.tokens_ND.to(dtype)), response.visual_tokens)
    return response


@serve.deployment(name="Encoder")
class Encoder(GrpcOnly):
    """One replica of stage 1; takes no LLM weight into memory."""

    def __init__(self, settings: EncoderSettings):
        device, dtype = settings.place()
        gpu_part(device, lambda: ray.get_runtime_context().get_assigned_resources())
        self._pipeline = EncoderPipeline.from_checkpoint(
            settings.checkpoint,
            dtype=dtype,
            device=device,
            limits=settings.media,
        )
        self._wire_dtype: torch.dtype = getattr(torch, settings.wire_dtype)
        self._metrics = Metrics("encoder", ray.serve.metrics)
        self._batcher = TileBatcher(
            self._pipeline,
            max_tiles=settings.max_tiles or default_tiles(on_gpu=torch.device(device).type == "cuda"),
            max_wait_s=settings.max_wait_s,
            decode_threads=settings.decode_threads,
            on_batch=lambda tiles: self._metrics.observe("focusllava_tiles_per_batch", tiles),
        )
        self._reporter = Reporter(self._report)

    async def Encode(
        self, request: encoder_pb2.EncodeRequest, grpc_context: RayServegRPCContext
    ) -> encoder_pb2.EncodeResponse:
        """EncoderService.Encode."""
        received, outcome = time.monotonic(), "cancelled"
        try:
            check_fingerprint(request.model_fingerprint, self._pipeline.fingerprint)
            options = wire.image_options_from_proto(request.options)
            tokens = await self._batcher.encode(request.image, request.vision_sampler, options)
            response = await asyncio.to_thread(encode_response, tokens, self._wire_dtype)
            outcome = "ok"
            return response
        except Exception as error:
            refused = refuse(grpc_context, error)
            outcome = refused.code.value
            raise refused from None
        finally:
            self._metrics.count("focusllava_encode_requests", outcome=outcome)
            self._metrics.observe("focusllava_encode_seconds", time.monotonic() - received)

    async def CheckEncoder(
        self, request: encoder_pb2.CheckEncoderRequest, grpc_context: RayServegRPCContext
    ) -> encoder_pb2.CheckEncoderResponse:
        """EncoderService.CheckEncoder."""
        try:
            check_fingerprint(request.model_fingerprint, self._pipeline.fingerprint)
            self.check_health()
            return encoder_pb2.CheckEncoderResponse()
        except Exception as error:
            raise refuse(grpc_context, error) from None

    def check_health(self) -> None:
        """Called by Serve, which replaces the replica where it raises."""
        self._reporter.check()

    def _report(self) -> None:
        self._metrics.set("focusllava_encoder_waiting_images", self._batcher.waiting)
