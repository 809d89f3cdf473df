"""The life of a chat request at the gateway: admit, images to visual tokens (cached), language model, accounting."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Protocol

from focusllava.v1 import encoder_pb2, error_pb2, focus_pb2, llm_pb2
from services.common import wire
from services.common.errors import FocusError, with_field
from services.common.grpc_status import code_of, status_of
from services.common.telemetry import Metrics
from services.common.types import ImageOptions
from services.gateway.admission import AdmissionLimits, AdmittedChat, AdmittedImage, admit
from services.gateway.cache import CacheKey, VisualTokenCache
from services.gateway.stages import Deadline, UnusableVisualTokens


class Encoder(Protocol):
    """Stage 1, as the gateway calls it."""

    async def encode(
        self, image: bytes, vision_sampler: bool, options: ImageOptions, deadline: Deadline
    ) -> encoder_pb2.CompressedVisualTokens: ...


class LanguageModel(Protocol):
    """Stage 2, as the gateway calls it."""

    def generate(
        self, request: llm_pb2.GenerateRequest, deadline: Deadline
    ) -> AsyncGenerator[llm_pb2.GenerateResponse, None]: ...


class ChatService:
    """Answers chat requests; knows nothing of Ray."""

    def __init__(
        self,
        *,
        model_fingerprint: str,
        encoder: Encoder,
        language_model: LanguageModel,
        cache: VisualTokenCache,
        metrics: Metrics,
        limits: AdmissionLimits,
    ):
        self.limits = limits
        self._fingerprint, self._metrics = model_fingerprint, metrics
        self._encoder, self._language_model, self._cache = encoder, language_model, cache
        self._in_flight = 0

    async def chat(
        self, request: focus_pb2.ChatRequest, request_id: str, deadline: Deadline
    ) -> AsyncGenerator[focus_pb2.ChatResponse, None]:
        """started, token*, then finished or error.

        Raises:
            FocusError: before the first event only; afterwards a failure is the stream's last event.
        """
        received = time.monotonic()
        outcome = "cancelled"
        self._count_in_flight(+1)
        started = False
        try:
            async with contextlib.aclosing(self._events(request, request_id, deadline, received)) as events:
                async for event in events:
                    started = True
                    kind = event.WhichOneof("event")
                    outcome = event.error.code if kind == "error" else "ok" if kind == "finished" else outcome
                    yield event
        except Exception as error:
            outcome = code_of(error).value
            if not started:
                raise
            code, message = status_of(error, request_id)
            yield focus_pb2.ChatResponse(error=error_pb2.StreamError(code=code.value, message=message))
        finally:
            self._count_in_flight(-1)
            self._metrics.count("focusllava_requests", outcome=outcome)
            self._metrics.observe("focusllava_request_seconds", time.monotonic() - received)

    def _count_in_flight(self, change: int) -> None:
        self._in_flight += change
        self._metrics.set("focusllava_requests_in_flight", self._in_flight)

    async def _events(
        self, request: focus_pb2.ChatRequest, request_id: str, deadline: Deadline, received: float
    ) -> AsyncGenerator[focus_pb2.ChatResponse, None]:
        admitted = await asyncio.to_thread(admit, request, self.limits, request_id)  # hashes megabytes
        images = await self._visual_tokens(admitted, deadline)
        generate = self._generate_request(admitted, [tokens for tokens, _ in images])
        started = focus_pb2.ChatStarted(request_id=request_id, images=[_image_info(*image) for image in images])
        first_token_s: float | None = None
        announced = False
        answer = self._language_model.generate(generate, deadline)
        async with self._forgetting_unusable(admitted), contextlib.aclosing(answer) as events:
            async for event in events:
                if not announced:  # only now is it sure that the model takes the request
                    announced = True
                    usage = event.finished.usage  # an answer without a token has it there alone
                    started.prompt_tokens = event.token.prompt_tokens or usage.prompt_tokens
                    yield focus_pb2.ChatResponse(started=started)
                kind = event.WhichOneof("event")
                if kind == "token":
                    if first_token_s is None:
                        first_token_s = time.monotonic() - received
                        self._metrics.observe("focusllava_time_to_first_token_seconds", first_token_s)
                    yield focus_pb2.ChatResponse(token=event.token)
                elif kind == "finished":
                    event.finished.usage.time_to_first_token_ms = (first_token_s or 0.0) * 1000
                    self._record(event.finished.usage)
                    yield focus_pb2.ChatResponse(finished=event.finished)
                else:
                    yield focus_pb2.ChatResponse(error=event.error)

    @contextlib.asynccontextmanager
    async def _forgetting_unusable(self, admitted: AdmittedChat) -> AsyncGenerator[None, None]:
        """Takes visual tokens that the model refuses out of the cache, where they would be refused again."""
        try:
            yield
        except UnusableVisualTokens:
            for image in admitted.images:
                await self._cache.discard(self._key(image, admitted))
            raise

    def _key(self, image: AdmittedImage, admitted: AdmittedChat) -> CacheKey:
        return CacheKey(
            content_hash=image.content_hash,
            model_fingerprint=self._fingerprint,
            vision_sampler=admitted.samplers.vision_sampler,
            options=image.options,
        )

    async def _visual_tokens(
        self, admitted: AdmittedChat, deadline: Deadline
    ) -> list[tuple[encoder_pb2.CompressedVisualTokens, bool]]:
        tasks = [asyncio.ensure_future(self._one_image(image, admitted, deadline)) for image in admitted.images]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _one_image(
        self, image: AdmittedImage, admitted: AdmittedChat, deadline: Deadline
    ) -> tuple[encoder_pb2.CompressedVisualTokens, bool]:
        key = self._key(image, admitted)
        try:
            async with asyncio.timeout(deadline.remaining_s(at_most=3600)):
                # Others may wait for the same encoding: it runs under the stage's own limit, not one caller's deadline.
                return await self._cache.get_or_encode(
                    key, lambda: self._encoder.encode(image.data, key.vision_sampler, image.options, Deadline())
                )
        except FocusError as error:
            raise with_field(error, image.field) from error

    def _generate_request(
        self, admitted: AdmittedChat, images: list[encoder_pb2.CompressedVisualTokens]
    ) -> llm_pb2.GenerateRequest:
        generate = llm_pb2.GenerateRequest(
            # Two callers may choose the same id; the stage needs them apart.
            request_id=f"{admitted.request_id}.{secrets.token_hex(4)}",
            model_fingerprint=self._fingerprint,
            turns=admitted.turns,
            images=images,
            sampling=admitted.sampling,
            prune=wire.samplers_to_proto(admitted.samplers),
            continue_final_message=admitted.continue_final_message,
            raw_prompt=admitted.raw_prompt,
        )
        if generate.sampling.temperature > 0 and not generate.sampling.HasField("seed"):
            generate.sampling.seed = secrets.randbits(63)  # so that a lost stage can repeat its draws
        return generate

    def _record(self, usage: llm_pb2.Usage) -> None:
        count = self._metrics.count
        count("focusllava_output_tokens", usage.completion_tokens)
        count("focusllava_visual_tokens_uncompressed", usage.visual_tokens_uncompressed)
        count("focusllava_visual_tokens_sampled", usage.visual_tokens_sampled)
        count("focusllava_visual_tokens_kept", usage.visual_tokens_kept)
        if usage.visual_tokens_uncompressed:
            self._metrics.observe("focusllava_converted_share_percent", usage.converted_share_percent)


def _image_info(tokens: encoder_pb2.CompressedVisualTokens, cached: bool) -> focus_pb2.ImageInfo:
    return focus_pb2.ImageInfo(
        content_hash=tokens.content_hash,
        cached=cached,
        visual_tokens_uncompressed=tokens.uncompressed_tokens,
        visual_tokens_sampled=tokens.tokens.shape[0] if tokens.tokens.shape else 0,
        notes=tokens.notes,
    )
