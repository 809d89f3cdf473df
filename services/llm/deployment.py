"""Stage 2 as a Ray Serve deployment: LanguageModelService at its own port and Serve's ingress, around the engine."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncGenerator

import ray
import ray.serve.metrics
from ray import serve
from ray.serve.grpc_util import RayServegRPCContext

from focusllava.sizes import size_text
from focusllava.v1 import error_pb2, llm_pb2, llm_pb2_grpc
from services.common import wire
from services.common.errors import FocusError
from services.common.grpc_status import check_fingerprint, refuse, status_of
from services.common.logs import log_event, set_request_id_from, set_up_logs
from services.common.port import SHELF_NAMES_METADATA, StagePort
from services.common.recent_mean import RecentMean
from services.common.shelf import Shelf
from services.common.telemetry import Metrics
from services.common.tracing import set_up_traces
from services.common.types import FinishedEvent, GenerateRequest, TokenEvent
from services.compute.replica import Reporter, StageDeployment, gpu_part
from services.llm.async_engine import AsyncEngine
from services.llm.engine import Engine
from services.llm.received import Received
from services.llm.settings import LanguageModelSettings
from services.text.token_texts import TokenTexts


def request_sizes(engine: Engine) -> wire.RequestSizes:
    """The most that a request to this engine may hold."""
    return wire.RequestSizes(context=engine.decoder.context, width=engine.decoder.config.hidden_size)


@serve.deployment(name="LanguageModel")
class LanguageModel(StageDeployment):
    """One replica of stage 2; takes no encoder weight into memory."""

    def __init__(self, settings: LanguageModelSettings):
        set_up_logs(os.environ)
        set_up_traces(os.environ, "llm")
        device, dtype = settings.place()
        part = gpu_part(device, lambda: ray.get_runtime_context().get_assigned_resources())
        sizes = settings.replica_sizes(device, dtype, part)
        log_event(f"KV cache of {size_text(sizes.kv_cache_bytes)}: {sizes.full_images} requests of a full image")
        self._model = Engine.from_checkpoint(settings.checkpoint, settings.sized(sizes), dtype=dtype, device=device)
        self._model.warm_up()
        self._engine = AsyncEngine(self._model, gather_s=settings.gather_s)
        self._metrics = Metrics("llm", ray.serve.metrics)
        self._stall_s = settings.stall_s
        self._progress = (0, time.monotonic())  # passes so far, and when that last changed or there was nothing to do
        self._token_texts = TokenTexts(self._model.renderer.tokenizer, self._model.grammars.token_bytes)
        self._received = Received(request_sizes(self._model), Shelf.open(), settings.shelf_bytes)
        self._prompt_tokens = RecentMean()
        self._reporter = Reporter(self._report)
        self.host = ray.util.get_node_ip_address()
        self.port = StagePort(
            self,
            llm_pb2_grpc.add_LanguageModelServiceServicer_to_server,
            lambda: serve.get_replica_context()._deployment_config,
            unlimited=("CheckLanguageModel",),
        )

    async def Generate(
        self, request: llm_pb2.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[llm_pb2.GenerateResponse, None]:
        """LanguageModelService.Generate. A cancelled call aborts the generation and frees its KV cache."""
        received, outcome, started = time.monotonic(), "cancelled", False
        facts: dict[str, int] = {}
        set_request_id_from(grpc_context, otherwise=request.request_id)
        try:
            self.port.admit(grpc_context)
            check_fingerprint(request.model_fingerprint, self._model.fingerprint)
            asked = await self._engine.take_in(self._received.read, request)  # copies megabytes
            taken = zip(asked.images, request.images, strict=True)
            sent = sum(image.tokens_ND.nbytes for image, message in taken if not message.shelf_name)
            self._metrics.count("focusllava_visual_token_bytes_taken", sent)
            async with contextlib.aclosing(self._engine.generate(asked)) as events:
                async for event in events:
                    if not started:
                        started = True
                        self._metrics.observe("focusllava_llm_time_to_first_token_seconds", time.monotonic() - received)
                        if isinstance(event, TokenEvent):
                            self._prompt_tokens.add(event.prompt_tokens)
                    if isinstance(event, FinishedEvent):
                        outcome = "ok"
                        usage = event.usage
                        facts = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
                        await self._tell_names(asked, request, grpc_context)
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
            log_event("answer ended", outcome=outcome, seconds=round(time.monotonic() - received, 3), **facts)

    async def _tell_names(
        self, asked: GenerateRequest, request: llm_pb2.GenerateRequest, context: RayServegRPCContext
    ) -> None:
        """Leaves images that came as bytes on the shelf, and tells the caller their names."""
        if any(not image.shelf_name for image in request.images):
            with contextlib.suppress(FocusError):  # the engine is closed; the answer is there all the same
                names = await self._engine.take_in(self._received.names, asked)
                context.set_trailing_metadata([(SHELF_NAMES_METADATA, ",".join(names))])

    async def record_replica_metadata(self) -> dict[str, str]:
        """The port's address and secret, and the shelf of this node, for the gateways."""
        shelf = self._received.shelf
        return {**await super().record_replica_metadata(), "shelf": shelf.identity if shelf else ""}

    async def CheckLanguageModel(
        self, request: llm_pb2.CheckLanguageModelRequest, grpc_context: RayServegRPCContext
    ) -> llm_pb2.CheckLanguageModelResponse:
        """LanguageModelService.CheckLanguageModel."""
        try:
            self.port.admit(grpc_context)
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

    def work(self) -> dict[str, float]:
        """Prefill, KV cache and answers; a call that waits at the port counts as the latest prompts on average."""
        stats, waiting = self._engine.stats(), self.port.places.waiting
        return {
            "focusllava_prefill_tokens_left": stats.prefill_tokens_left + waiting * self._prompt_tokens.value,
            "focusllava_kv_percent_wanted": 100 * stats.kv_pages_wanted / stats.kv_pages_total,
            "focusllava_answers": stats.running + stats.waiting + waiting,
        }

    def _report(self) -> None:
        for name, value in self.work().items():
            self._metrics.set(name, value)
        stats = self._engine.stats()
        passes = stats.prefill_passes + stats.decode_passes
        if passes != self._progress[0] or not (stats.running or stats.waiting):
            self._progress = (passes, time.monotonic())
        self._metrics.set("focusllava_llm_calls", self.port.places.taken)
        self._metrics.set("focusllava_running_requests", stats.running)
        self._metrics.set("focusllava_waiting_requests", stats.waiting)
        self._metrics.set("focusllava_kv_pages_used", stats.kv_pages_used)
        self._metrics.set("focusllava_kv_pages_cached", stats.kv_pages_cached)
        self._metrics.set("focusllava_kv_pages_total", stats.kv_pages_total)
        self._metrics.set("focusllava_preemptions", stats.preemptions)
        self._metrics.set("focusllava_prompt_tokens_reused", stats.prompt_tokens_reused)
