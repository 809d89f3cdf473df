"""Stage 2 as a Ray Serve deployment: LanguageModelService over Serve's gRPC ingress, around the asynchronous engine."""

from __future__ import annotations

import contextlib
import logging
import platform
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal

import ray
import ray.serve.metrics
import torch
from ray import serve
from ray.serve.grpc_util import RayServegRPCContext

from focusllava.sizes import size_text
from focusllava.v1 import error_pb2, llm_pb2
from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.sizing import LlmSizes, size_encoder, size_llm
from services.checkpoint.store import stage_elements
from services.checkpoint.supported import check_servable
from services.common import wire
from services.common.grpc_status import check_fingerprint, refuse, status_of
from services.common.memory import device_memory
from services.common.replica import GrpcOnly, ModelSettings, Reporter
from services.common.settings import require
from services.common.telemetry import Metrics
from services.common.types import FinishedEvent
from services.llm.async_engine import AsyncEngine
from services.llm.engine import Engine
from services.llm.token_texts import TokenTexts

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, kw_only=True)
class LanguageModelSettings(ModelSettings):
    """`args` of the llm application."""

    kv_cache_bytes: int | None = None
    """Pays for keys and values, and for the hidden states beside those that may be used again. Unset, this and the two
    below follow from checkpoint, device and `memory_share` (`services/checkpoint/sizing.py`)."""
    max_batch_tokens: int | None = None
    """Tokens of one step: running answers wait no longer than this for a prompt that arrives."""
    max_running: int | None = None
    """Most requests in work together."""
    max_model_len: int | None = None
    """Tokens of prompt and answer together; unset: the model's own context."""
    prefix_reuse: bool = True
    """Equal beginnings of prompts, images included, go through the lower layers once."""
    quantize: Literal["int8"] | None = None
    """"int8" quantises weights and inputs of the decoder's linear layers, on a CPU with AVX-512 VNNI."""
    stall_s: float = 300.0
    """A replica whose requests made no progress for this long is replaced."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kv_cache_bytes", "max_batch_tokens", "max_running", "max_model_len"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "1 or more")
        require(self.stall_s >= 0, "stall_s", self.stall_s, "0 or more seconds")
        require(self.quantize in (None, "int8"), "quantize", self.quantize, '"int8" or nothing')

    def sizes(self, device: str, dtype: torch.dtype) -> LlmSizes:
        """Sizes of a replica that is about to load. Raises InvalidInput for what could never answer a full image."""
        config, on_gpu = FocusLlavaConfig.load(self.checkpoint), torch.device(device).type == "cuda"
        check_servable(config)
        memory, budget = device_memory(device), None
        if self.kv_cache_bytes is None and on_gpu:  # GPU only
            budget = min(int(self.memory_share * _gpu_part() * memory.total), memory.free)
        elif self.kv_cache_bytes is None:
            encoder = size_encoder(config, stage_elements(self.checkpoint, "encoder"), dtype=dtype, on_gpu=False)
            budget = int(self.memory_share * memory.free) - encoder.bytes
        return size_llm(
            config,
            stage_elements(self.checkpoint, "llm"),
            dtype=dtype,
            on_gpu=on_gpu,
            budget=budget,
            where=f"{device} of {platform.node()}",
            kv_cache_bytes=self.kv_cache_bytes,
            max_batch_tokens=self.max_batch_tokens,
            max_running=self.max_running,
            max_model_len=self.max_model_len,
        )


def _gpu_part() -> float:  # GPU only
    """The part of a GPU that Ray gave this replica."""
    return min(ray.get_runtime_context().get_assigned_resources().get("GPU", 1.0), 1.0)


def request_sizes(engine: Engine) -> wire.RequestSizes:
    """The most that a request to this engine may hold."""
    return wire.RequestSizes(context=engine.decoder.context, width=engine.decoder.config.hidden_size)


@serve.deployment(name="LanguageModel")
class LanguageModel(GrpcOnly):
    """One replica of stage 2; takes no encoder weight into memory."""

    def __init__(self, settings: LanguageModelSettings):
        device, dtype = settings.place()
        sizes = settings.sizes(device, dtype)
        logger.info(f"KV cache of {size_text(sizes.kv_cache_bytes)}: {sizes.full_images} requests of a full image")
        self._model = Engine.from_checkpoint(
            settings.checkpoint,
            dtype=dtype,
            device=device,
            kv_cache_bytes=sizes.kv_cache_bytes,
            max_batch_tokens=sizes.max_batch_tokens,
            max_running=sizes.max_running,
            max_model_len=settings.max_model_len,
            prefix_reuse=settings.prefix_reuse,
            quantize=settings.quantize,
        )
        self._model.warm_up()
        self._engine = AsyncEngine(self._model)
        self._metrics = Metrics("llm", ray.serve.metrics)
        self._stall_s = settings.stall_s
        self._progress = (0, time.monotonic())  # passes so far, and when that last changed or there was nothing to do
        self._token_texts = TokenTexts(self._model.renderer.tokenizer, self._model.grammars.token_bytes)
        self._sizes = request_sizes(self._model)
        self._reporter = Reporter(self._report)

    async def Generate(
        self, request: llm_pb2.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[llm_pb2.GenerateResponse, None]:
        """LanguageModelService.Generate. A cancelled call aborts the generation and frees its KV cache."""
        received, outcome, started = time.monotonic(), "cancelled", False
        try:
            check_fingerprint(request.model_fingerprint, self._model.fingerprint)
            self._sizes.check(request)
            asked = await self._engine.take_in(wire.generate_request_from_proto, request)  # copies megabytes
            async with contextlib.aclosing(self._engine.generate(asked)) as events:
                async for event in events:
                    if not started:
                        started = True
                        self._metrics.observe("focusllava_llm_time_to_first_token_seconds", time.monotonic() - received)
                    if isinstance(event, FinishedEvent):
                        outcome = "ok"
                    yield wire.event_to_proto(self._token_texts.filled_in(event))
        except Exception as error:
            if not started:
                refused = refuse(grpc_context, error, request.request_id)
                outcome = refused.code.value
                raise refused from None
            code, message = status_of(error, request.request_id)
            outcome = code.value
            yield llm_pb2.GenerateResponse(error=error_pb2.StreamError(code=code.value, message=message))
        finally:
            self._metrics.count("focusllava_generate_requests", outcome=outcome)

    async def CheckLanguageModel(
        self, request: llm_pb2.CheckLanguageModelRequest, grpc_context: RayServegRPCContext
    ) -> llm_pb2.CheckLanguageModelResponse:
        """LanguageModelService.CheckLanguageModel."""
        try:
            check_fingerprint(request.model_fingerprint, self._model.fingerprint)
            self.check_health()
            return llm_pb2.CheckLanguageModelResponse()
        except Exception as error:
            raise refuse(grpc_context, error) from None

    def check_health(self) -> None:
        """Called by Serve; raising has the replica replaced."""
        self._reporter.check()
        self._engine.check()
        if time.monotonic() - self._progress[1] > self._stall_s:
            raise RuntimeError("requests wait or run, but no pass has ended")

    def _report(self) -> None:
        stats = self._engine.stats()
        passes = stats.prefill_passes + stats.decode_passes
        if passes != self._progress[0] or not (stats.running or stats.waiting):
            self._progress = (passes, time.monotonic())
        self._metrics.set("focusllava_running_requests", stats.running)
        self._metrics.set("focusllava_waiting_requests", stats.waiting)
        self._metrics.set("focusllava_kv_blocks_used", stats.kv_blocks_used)
        self._metrics.set("focusllava_kv_blocks_total", stats.kv_blocks_total)
        self._metrics.set("focusllava_preemptions", stats.preemptions)
        self._metrics.set("focusllava_prompt_tokens_reused", stats.prompt_tokens_reused)
