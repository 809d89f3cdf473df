"""The life of a chat request at the gateway: admit, images to visual tokens (cached), language model, accounting."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

from focusllava.v1 import encoder_pb2, error_pb2, focus_pb2, llm_pb2
from services.checkpoint.config import FocusLlavaConfig
from services.common import wire
from services.common.errors import FocusError, InternalError, InvalidInput, with_field
from services.common.grpc_status import code_of, status_of
from services.common.logs import log_event, set_request_id
from services.common.telemetry import Metrics
from services.common.tracing import span
from services.common.types import CompressedVisualTokens, ImageOptions
from services.focus_maps.compose import focus_maps
from services.gateway.admission import AdmissionLimits, AdmittedChat, AdmittedImage, ImageSizes, admit
from services.gateway.cache import CacheKey, VisualTokenCache
from services.gateway.callers import Caller
from services.gateway.compression import Compression, LoadCompression, LoadController, Waiting
from services.gateway.deadline import Deadline
from services.gateway.held_bytes import HeldBytes
from services.gateway.read_image import ReadImage
from services.gateway.stage_errors import UnusableVisualTokens
from services.gateway.turns import Turns

_LONGEST_WAIT_S = 3600
"""Longest wait for a turn or for an image, in seconds, where the caller has no deadline of its own."""


class Encoder(Protocol):
    """Stage 1, as the gateway calls it."""

    async def encode(
        self, image: bytes, vision_sampler: bool, options: ImageOptions, deadline: Deadline
    ) -> encoder_pb2.CompressedVisualTokens: ...


class LanguageModel(Protocol):
    """Stage 2, as the gateway calls it."""

    def generate(
        self, request: llm_pb2.GenerateRequest, deadline: Deadline, keys: Sequence[str] = ()
    ) -> AsyncGenerator[llm_pb2.GenerateResponse, None]: ...


class ChatService:
    """Answers chat requests; knows nothing of Ray."""

    def __init__(
        self,
        *,
        model_fingerprint: str,
        config: FocusLlavaConfig,
        encoder: Encoder,
        language_model: LanguageModel,
        cache: VisualTokenCache,
        metrics: Metrics,
        limits: AdmissionLimits,
        image_sizes: ImageSizes,
        load_compression: LoadCompression | None = None,
    ):
        self.load = LoadController(load_compression)
        self.held = HeldBytes(limits.held_bytes, metrics)
        """Bytes of requests, those that the HTTP door reads included."""
        self._limits, self._image_sizes = limits, image_sizes
        self._turns = Turns(limits.running, limits.waiting, metrics)
        self._fingerprint, self._config, self._metrics = model_fingerprint, config, metrics
        self._encoder, self._language_model, self._cache = encoder, language_model, cache
        self._in_flight = 0

    @property
    def limits(self) -> AdmissionLimits:
        """The door's limits; new ones count from the next request on."""
        return self._limits

    @limits.setter
    def limits(self, limits: AdmissionLimits) -> None:
        self._limits = limits
        self._turns.running, self._turns.waiting = limits.running, limits.waiting
        self.held.limit = limits.held_bytes

    async def chat(
        self, request: focus_pb2.ChatRequest, request_id: str, deadline: Deadline, caller: Caller
    ) -> AsyncGenerator[focus_pb2.ChatResponse, None]:
        """started, token*, then finished or error; focus_maps after the first token, for who asked for them.

        Raises:
            FocusError: before the first event only; afterwards a failure is the stream's last event.
        """
        set_request_id(request_id)
        with span("chat", request_id=request_id, key=caller.name) as facts:
            async with contextlib.aclosing(self._counted(request, request_id, deadline, caller, facts)) as events:
                async for event in events:
                    yield event

    async def _counted(
        self,
        request: focus_pb2.ChatRequest,
        request_id: str,
        deadline: Deadline,
        caller: Caller,
        facts: dict[str, Any],
    ) -> AsyncGenerator[focus_pb2.ChatResponse, None]:
        """The answer as `chat` has it; what it came to is counted, logged and put into `facts`."""
        received = time.monotonic()
        outcome, usage = "cancelled", llm_pb2.Usage()
        self._count_in_flight(+1)
        started = False
        try:
            with caller.request(), self.held.holding(caller, request.ByteSize()):
                answer = self._events(request, request_id, deadline, caller, received)
                async with contextlib.aclosing(answer) as events:
                    async for event in events:
                        started = True
                        kind = event.WhichOneof("event")
                        outcome = event.error.code if kind == "error" else "ok" if kind == "finished" else outcome
                        usage = event.finished.usage if kind == "finished" else usage
                        yield event
        except Exception as error:
            outcome = code_of(error).value
            if not started:
                raise
            code, message = status_of(error, request_id)
            yield focus_pb2.ChatResponse(error=error_pb2.StreamError(code=code.value, message=message))
        finally:
            self._count_in_flight(-1)
            seconds = time.monotonic() - received
            self._metrics.count("focusllava_requests", outcome=outcome, key=caller.name)
            self._metrics.observe("focusllava_request_seconds", seconds)
            facts |= {
                "outcome": outcome,
                "first_token_ms": round(usage.time_to_first_token_ms),
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
            }
            log_event("request ended", key=caller.name, seconds=round(seconds, 3), **facts)

    def report(self) -> None:
        """Sets the gauge of requests in flight."""
        self._metrics.set("focusllava_requests_in_flight", self._in_flight)

    def _count_in_flight(self, change: int) -> None:
        self._in_flight += change
        self.report()

    async def _events(
        self, request: focus_pb2.ChatRequest, request_id: str, deadline: Deadline, caller: Caller, received: float
    ) -> AsyncGenerator[focus_pb2.ChatResponse, None]:
        limits = dataclasses.replace(self.limits, max_tokens=caller.most_tokens(self.limits.max_tokens))
        admitted = await asyncio.to_thread(admit, request, limits, request_id)  # hashes megabytes
        async with self.load.wait() as waiting, contextlib.AsyncExitStack() as turn:
            async with asyncio.timeout(deadline.remaining_s(at_most=_LONGEST_WAIT_S)):
                await turn.enter_async_context(self._turns.turn(caller, admitted.load(self._image_sizes)))
            answer = self._answer(admitted, waiting, deadline, caller, received)
            async with contextlib.aclosing(answer) as events:
                async for event in events:
                    yield event

    async def _answer(
        self, admitted: AdmittedChat, waiting: Waiting, deadline: Deadline, caller: Caller, received: float
    ) -> AsyncGenerator[focus_pb2.ChatResponse, None]:
        admitted, compression = self._compressed(admitted)
        images = await self._visual_tokens(admitted, compression, deadline)
        admitted = dataclasses.replace(admitted, images=tuple(image.image for image in images))
        compression = compression.as_used(image.options.map_share for image in admitted.images)
        generate = self._generate_request(admitted, [image.tokens for image in images])
        started = focus_pb2.ChatStarted(request_id=admitted.request_id, images=[image.info() for image in images])
        first_token_s: float | None = None
        announced = False
        keys = [str(self._key(image, admitted)) for image in admitted.images]
        answer = self._language_model.generate(generate, deadline, keys)
        async with self._forgetting_unusable(admitted), contextlib.aclosing(answer) as events:
            async for event in events:
                if not announced:  # only now is it sure that the model takes the request
                    announced = True
                    usage = event.finished.usage  # an answer without a token has it there alone
                    started.prompt_tokens = event.token.prompt_tokens or usage.prompt_tokens
                    caller.charge(started.prompt_tokens)
                    yield focus_pb2.ChatResponse(started=started)
                kind = event.WhichOneof("event")
                if kind == "token":
                    caller.charge(len(event.token.token_ids))
                    if first_token_s is None:
                        waiting.first_token()
                        first_token_s = time.monotonic() - received
                        self._metrics.observe("focusllava_time_to_first_token_seconds", first_token_s)
                    yield focus_pb2.ChatResponse(token=event.token)
                elif kind == "finished":
                    event.finished.usage.time_to_first_token_ms = (first_token_s or 0.0) * 1000
                    decoding_s = time.monotonic() - received - (first_token_s or 0.0)
                    self._record(event.finished.usage, compression, caller, decoding_s)
                    yield focus_pb2.ChatResponse(finished=event.finished)
                elif kind == "decision":
                    outlines = [wire.outline_from_proto(image.tokens) for image in images]
                    maps = await asyncio.to_thread(self._maps, outlines, admitted, event.decision)
                    yield focus_pb2.ChatResponse(focus_maps=maps)
                else:
                    yield focus_pb2.ChatResponse(error=event.error)

    def _maps(
        self, outlines: list[CompressedVisualTokens], admitted: AdmittedChat, message: llm_pb2.PruneDecision
    ) -> focus_pb2.FocusMaps:
        """What both samplers chose, for the caller. outlines: the images' visual tokens, whose data is not read."""
        try:
            decision = wire.decision_from_proto(message)
            maps = focus_maps(outlines, decision, self._config, sampled=admitted.samplers.vision_sampler)
        except InvalidInput as error:  # of our own stages
            raise InternalError(f"no focus map can be made, {error}") from error
        return wire.focus_maps_to_proto(maps, decision)

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
        self, admitted: AdmittedChat, compression: Compression, deadline: Deadline
    ) -> list[ReadImage]:
        shares = self.load.gentler(compression)
        tasks = [asyncio.ensure_future(self._one_image(image, shares, admitted, deadline)) for image in admitted.images]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _one_image(
        self, image: AdmittedImage, shares: Sequence[float | None], admitted: AdmittedChat, deadline: Deadline
    ) -> ReadImage:
        """shares: each `map_share` of which known tokens are taken as they are."""
        key = self._key(image, admitted)
        try:
            async with asyncio.timeout(deadline.remaining_s(at_most=_LONGEST_WAIT_S)):
                for share in shares:
                    known = image.with_map_share(share)
                    if found := await self._cache.find(self._key(known, admitted)):
                        return ReadImage(known, found, True)
                # Others may wait for the same encoding: it runs under the stage's own limit, not one caller's deadline.
                return ReadImage(
                    image,
                    *await self._cache.get_or_encode(
                        key, lambda: self._encoder.encode(image.data, key.vision_sampler, image.options, Deadline())
                    ),
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
            return_decision=admitted.return_map,
        )
        if generate.sampling.temperature > 0 and not generate.sampling.HasField("seed"):
            generate.sampling.seed = secrets.randbits(63)  # so that a lost stage can repeat its draws
        return generate

    def _compressed(self, admitted: AdmittedChat) -> tuple[AdmittedChat, Compression]:
        admitted, compression = self.load.compress(admitted)
        self._metrics.set("focusllava_compression_level", self.load.level)
        return admitted, compression

    def _record(self, usage: llm_pb2.Usage, compression: Compression, caller: Caller, decoding_s: float) -> None:
        """Adds to the usage what the load set, and counts it. decoding_s: from the first token to the end."""
        count, observe = self._metrics.count, self._metrics.observe
        if compression.level:
            usage.compression_level = compression.level
            usage.load_map_share = compression.map_share or 0.0
            usage.load_threshold = compression.threshold or 0.0
            count("focusllava_requests_compressed", level=str(compression.level))
        count("focusllava_prompt_tokens", usage.prompt_tokens)
        count("focusllava_output_tokens", usage.completion_tokens, key=caller.name)
        count("focusllava_visual_tokens_uncompressed", usage.visual_tokens_uncompressed)
        count("focusllava_visual_tokens_sampled", usage.visual_tokens_sampled)
        count("focusllava_visual_tokens_kept", usage.visual_tokens_kept)
        if usage.completion_tokens > 1:
            observe("focusllava_time_per_output_token_seconds", decoding_s / (usage.completion_tokens - 1))
        if uncompressed := usage.visual_tokens_uncompressed:
            observe("focusllava_sampled_share_percent", 100 * usage.visual_tokens_sampled / uncompressed)
            observe("focusllava_kept_share_percent", 100 * usage.visual_tokens_kept / uncompressed)
            observe("focusllava_converted_share_percent", usage.converted_share_percent)
