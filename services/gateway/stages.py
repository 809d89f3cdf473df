"""Clients of the two stages: gRPC through Serve's ingress, with deadlines, and retries that never repeat text."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from focusllava.v1 import encoder_pb2, encoder_pb2_grpc, llm_pb2, llm_pb2_grpc
from services.common import wire
from services.common.errors import (
    DeadlineExceeded,
    FocusError,
    InternalError,
    InvalidInput,
    Overloaded,
    StageUnavailable,
    TooLarge,
    WrongFingerprint,
)
from services.common.grpc_status import replica_is_lost
from services.common.settings import require
from services.common.telemetry import Metrics
from services.common.types import ImageOptions
from services.gateway.replay import Replay

_log = logging.getLogger("focusllava")

MAX_MESSAGE_BYTES = 512 * 2**20
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_reconnect_backoff_ms", 1000),  # gRPC's default of two minutes outlives any restart
    # No keepalive: a gRPC server that gets more than one ping in five minutes without data ends the connection
    # (too_many_pings), so a call that waits quietly would be lost. The proxy is on this node: if it dies, TCP says so.
]


@dataclass(frozen=True, kw_only=True)
class StageAddress:
    """The place where a stage answers: host:port of a Serve gRPC ingress, and its Serve application."""

    target: str = "127.0.0.1:9000"
    application: str = ""
    attempts: int = 5
    """Tries of one call, the first included."""
    backoff_s: float = 0.2
    """Wait before the second try; it doubles with each one."""
    timeout_s: float = 300.0
    """Longest that one call may take when the caller set no shorter deadline."""

    def __post_init__(self) -> None:
        require(":" in self.target, "target", self.target, "host:port")
        require(self.attempts >= 1, "attempts", self.attempts, "1 or more")
        require(self.backoff_s >= 0, "backoff_s", self.backoff_s, "0 or more seconds")
        require(self.timeout_s > 0, "timeout_s", self.timeout_s, "more than 0 seconds")


TIMEOUT_METADATA = "focusllava-timeout-ms"
"""Ray Serve hides a call's own deadline from the replica; a client may say it here. Its cancellation arrives anyway."""


class Deadline:
    """The moment by which a request must be done; None means that only the stages' own limits apply."""

    def __init__(self, seconds: float | None = None):
        self._end = None if seconds is None else time.monotonic() + seconds

    @classmethod
    def said(cls, milliseconds: str | None) -> Deadline:
        """The deadline in a caller's TIMEOUT_METADATA; what is not a number counts as none."""
        try:
            seconds = float(milliseconds) / 1000 if milliseconds is not None else math.inf
        except (TypeError, ValueError):
            seconds = math.inf
        return cls(seconds if math.isfinite(seconds) else None)

    def remaining_s(self, at_most: float) -> float:
        """Seconds that remain, no more than `at_most`. Raises DeadlineExceeded when none do."""
        left = at_most if self._end is None else min(at_most, self._end - time.monotonic())
        if left <= 0:
            raise DeadlineExceeded("the request took longer than its deadline")
        return left


class UnusableVisualTokens(InternalError):
    """The LLM stage refuses what the encoder or the cache gave for an image."""


class _Stage:
    """One channel and the retry rule."""

    def __init__(self, name: str, address: StageAddress, metrics: Metrics):
        self.name, self.address, self._metrics = name, address, metrics
        self._channel = grpc.aio.insecure_channel(address.target, options=CHANNEL_OPTIONS)
        self._metadata = (("application", address.application or name),)
        self.heard_at = -math.inf
        """The moment of the stage's last answer, as time.monotonic() has it."""

    async def close(self) -> None:
        await self._channel.close(grace=None)

    async def _answered(self, call: Awaitable[Any]) -> None:
        """Waits for a call of which only success counts. Raises FocusError."""
        try:
            await call
        except grpc.aio.AioRpcError as error:
            raise self._error_of(error) from error
        self.heard_at = time.monotonic()

    async def _pause(self, attempt: int, error: FocusError, deadline: Deadline) -> None:
        """Waits before the next try, or raises `error` when there is none."""
        if attempt + 1 >= self.address.attempts:
            raise error
        pause_s = self.address.backoff_s * 2**attempt
        if deadline.remaining_s(self.address.timeout_s) <= pause_s:
            raise error
        self._metrics.count("focusllava_stage_retries", stage=self.name)
        _log.warning("%s stage: try %d failed (%s); trying again", self.name, attempt + 1, error)
        await asyncio.sleep(pause_s)

    def _error_of(self, error: grpc.aio.AioRpcError) -> FocusError:
        return stage_error(self.name, error.code(), error.details() or "")


def stage_error(stage: str, code: grpc.StatusCode, details: str) -> FocusError:
    """A stage's status as the error that the gateway raises. Only our own stages' messages pass through."""
    if replica_is_lost(details) or code in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,  # we did not cancel: the replica or its proxy went away
    ):
        return StageUnavailable(f"the {stage} stage is restarting or cannot be reached; try again")
    if code is grpc.StatusCode.NOT_FOUND:
        return StageUnavailable(f"the {stage} stage is not deployed")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded("the request took longer than its deadline")
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        if stage == "llm" and details.startswith("images["):  # the encoder made them, or the cache gave them
            _log.error("%s stage: %s", stage, details)
            return UnusableVisualTokens("an image's visual tokens were of no use; try again")
        return InvalidInput(details)
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        return WrongFingerprint(details)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        if "backpressure" in details or "max_queued_requests" in details:
            return Overloaded(f"the {stage} stage is full; try again later")
        return TooLarge(details)
    _log.error("%s stage: %s: %s", stage, code.name, details)
    return FocusError(f"the {stage} stage failed")


class EncoderClient(_Stage):
    """Stage 1."""

    def __init__(self, address: StageAddress, model_fingerprint: str, metrics: Metrics):
        super().__init__("encoder", address, metrics)
        self._fingerprint = model_fingerprint
        self._stub = encoder_pb2_grpc.EncoderServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def check(self, model_fingerprint: str, timeout_s: float) -> None:
        """Raises FocusError unless a replica that serves this checkpoint answers within `timeout_s`."""
        request = encoder_pb2.CheckEncoderRequest(model_fingerprint=model_fingerprint)
        await self._answered(self._stub.CheckEncoder(request, timeout=timeout_s, metadata=self._metadata))

    async def encode(
        self, image: bytes, vision_sampler: bool, options: ImageOptions, deadline: Deadline
    ) -> encoder_pb2.CompressedVisualTokens:
        """Encoding has no effect but its answer, so any lost call is tried again."""
        request = encoder_pb2.EncodeRequest(
            image=image,
            model_fingerprint=self._fingerprint,
            vision_sampler=vision_sampler,
            options=wire.image_options_to_proto(options),
        )
        for attempt in range(self.address.attempts):
            timeout_s = deadline.remaining_s(self.address.timeout_s)
            try:
                response = await self._stub.Encode(request, timeout=timeout_s, metadata=self._metadata)
                self.heard_at = time.monotonic()
                return response.visual_tokens
            except grpc.aio.AioRpcError as error:
                failure = self._error_of(error)
                if not isinstance(failure, StageUnavailable):
                    raise failure from error
                await self._pause(attempt, failure, deadline)
        raise AssertionError("the last try raises")


class LanguageModelClient(_Stage):
    """Stage 2."""

    def __init__(self, address: StageAddress, metrics: Metrics):
        super().__init__("llm", address, metrics)
        self._stub = llm_pb2_grpc.LanguageModelServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def check(self, model_fingerprint: str, timeout_s: float) -> None:
        """Raises FocusError unless a replica that serves this checkpoint answers within `timeout_s`."""
        request = llm_pb2.CheckLanguageModelRequest(model_fingerprint=model_fingerprint)
        await self._answered(self._stub.CheckLanguageModel(request, timeout=timeout_s, metadata=self._metadata))

    async def generate(
        self, request: llm_pb2.GenerateRequest, deadline: Deadline
    ) -> AsyncGenerator[llm_pb2.GenerateResponse, None]:
        """The stage's events; closing the iterator cancels the call and so the generation.

        A stage lost before the first token is called again. After it, too, when the draws are repeatable (greedy, or a
        seed): the new stream's text and tokens must begin with what was sent, and only the rest is passed on.
        """
        repeatable = request.sampling.temperature == 0 or request.sampling.HasField("seed")
        answer = Replay()
        for attempt in range(self.address.attempts):
            try:
                async with contextlib.aclosing(self._attempt(request, attempt, answer, deadline)) as events:
                    async for event in events:
                        yield event
                return
            except grpc.aio.AioRpcError as error:
                failure = self._error_of(error)
                if not isinstance(failure, StageUnavailable) or (answer.begun and not repeatable):
                    raise failure from error
            except StageUnavailable as lost:
                failure = lost
                if answer.begun and not repeatable:
                    raise
            await self._pause(attempt, failure, deadline)

    async def _attempt(
        self, request: llm_pb2.GenerateRequest, attempt: int, answer: Replay, deadline: Deadline
    ) -> AsyncGenerator[llm_pb2.GenerateResponse, None]:
        if attempt:  # the lost try may still be in flight under its own id
            again = llm_pb2.GenerateRequest()
            again.CopyFrom(request)
            again.request_id = f"{request.request_id}.{attempt}"
            request = again
        answer.start_over()
        timeout_s = deadline.remaining_s(self.address.timeout_s)
        call = self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata)
        ended = False
        try:
            async for event in call:
                self.heard_at = time.monotonic()
                kind = event.WhichOneof("event")
                if kind == "token":
                    fresh = answer.take(event.token)
                    if fresh is not None:
                        yield llm_pb2.GenerateResponse(token=fresh)
                    continue
                if kind == "error" and event.error.code == "UNAVAILABLE":
                    raise StageUnavailable(event.error.message)
                ended = True
                if kind == "finished":
                    answer.check_end()
                yield event
                return
        finally:
            if not ended:
                call.cancel()
        raise StageUnavailable(f"the {self.name} stage ended its stream early; try again")
