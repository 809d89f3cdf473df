"""Clients of the two stages: gRPC with deadlines, and retries that never repeat text."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass

import grpc.aio

from focusllava.errors import retry_after_s
from focusllava.v1 import encoder_pb2, encoder_pb2_grpc, llm_pb2, llm_pb2_grpc
from services.common import wire
from services.common.errors import FocusError, NotOnShelf, Overloaded, StageUnavailable
from services.common.logs import LOGGER, request_id_metadata
from services.common.settings import require
from services.common.shelf import Shelf
from services.common.stage_secret import SECRET_VARIABLE, shared_secret
from services.common.telemetry import Metrics
from services.common.types import ImageOptions
from services.gateway.affinity import beginning_of
from services.gateway.deadline import Deadline
from services.gateway.known_names import KnownNames
from services.gateway.replay import Replay
from services.gateway.replicas import IngressWay, Line, Replicas, ReplicaWay, Way
from services.gateway.stage_errors import UnusableVisualTokens, stage_error

_log = logging.getLogger(LOGGER)


@dataclass(frozen=True, kw_only=True)
class StageAddress:
    """The Serve application of a stage, and the way to it."""

    target: str | None = None
    """Unset: straight to the application's replicas in this cluster. "HOST:PORT": through this Serve gRPC ingress, to a
    stage of another cluster."""
    application: str = ""
    attempts: int = 5
    """Tries of one call, the first included."""
    backoff_s: float = 0.2
    """Wait before the second try; it doubles with each one."""
    timeout_s: float = 300.0
    """Longest that one call may take when the caller set no shorter deadline."""
    affinity: float | None = 1.25
    """Turns of a conversation go to the replica of the language model that has its beginning, its first image above
    all, unless that has this many times the mean of a gateway's calls already. None: to the one with the fewest calls.
    Without effect on the encoder and on a stage with a target."""

    def __post_init__(self) -> None:
        require(self.target is None or ":" in self.target, "target", self.target, "host:port")
        require(self.attempts >= 1, "attempts", self.attempts, "1 or more")
        require(self.backoff_s >= 0, "backoff_s", self.backoff_s, "0 or more seconds")
        require(self.timeout_s > 0, "timeout_s", self.timeout_s, "more than 0 seconds")
        require(self.affinity is None or self.affinity >= 1, "affinity", self.affinity, "1 or more, or null")


class _Stage:
    """The way to a stage and the retry rule."""

    def __init__(
        self,
        name: str,
        address: StageAddress,
        metrics: Metrics,
        replicas: Replicas | None = None,
        shelf: Shelf | None = None,
    ):
        """replicas: knows the stage's replicas, where the address has no target; shelf: this node's, if it has one."""
        self.name, self.address, self._metrics, self._shelf = name, address, metrics, shelf
        self._way: Way
        if address.target is not None:
            self._way = IngressWay(address.target, address.application or name, shared_secret(os.environ))
        else:
            assert replicas is not None, "a stage without a target needs its replicas"
            self._way = ReplicaWay(name, replicas, metrics, address.affinity)
        self.heard_at = -math.inf
        """The moment of the stage's last answer, as time.monotonic() has it."""

    async def close(self) -> None:
        await self._way.close()

    @contextlib.asynccontextmanager
    async def _line(self, timeout_s: float, beginning: str = "") -> AsyncIterator[Line]:
        """A line for one try. A status that ends the call is raised as a FocusError; what was lost or full is
        remembered. beginning: of the prompt, for the choice of a replica."""
        async with self._way.line(timeout_s, beginning) as line:
            try:
                yield line
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAUTHENTICATED and self.address.target is not None:
                    _log.error("%s stage: refuses this cluster's %s", self.name, SECRET_VARIABLE)
                    raise FocusError(f"the {self.name} stage refuses this gateway") from error
                failure = stage_error(self.name, error.code(), error.details() or "", retry_after_s(error))
                if isinstance(failure, StageUnavailable):
                    line.lost_at = time.monotonic()
                elif isinstance(failure, Overloaded):
                    line.full_at = time.monotonic()
                raise failure from error
            except StageUnavailable:
                line.lost_at = time.monotonic()
                raise

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


class EncoderClient(_Stage):
    """Stage 1."""

    def __init__(
        self,
        address: StageAddress,
        model_fingerprint: str,
        metrics: Metrics,
        replicas: Replicas | None = None,
        shelf: Shelf | None = None,
    ):
        super().__init__("encoder", address, metrics, replicas, shelf)
        self._fingerprint = model_fingerprint

    async def check(self, model_fingerprint: str, timeout_s: float) -> None:
        """Raises FocusError unless a replica that serves this checkpoint answers within `timeout_s`, or none is needed
        now: a stage that was scaled to zero comes with the next call."""
        if await self._way.is_asleep():
            return
        request = encoder_pb2.CheckEncoderRequest(model_fingerprint=model_fingerprint)
        async with self._line(timeout_s) as line:
            stub = line.stub(encoder_pb2_grpc.EncoderServiceStub)
            await stub.CheckEncoder(request, timeout=timeout_s, metadata=line.metadata)
        self.heard_at = time.monotonic()

    async def encode(
        self, image: bytes, vision_sampler: bool, options: ImageOptions, deadline: Deadline
    ) -> encoder_pb2.CompressedVisualTokens:
        """Encoding has no effect but its answer, so any lost call is tried again."""
        request = encoder_pb2.EncodeRequest(
            image=image,
            model_fingerprint=self._fingerprint,
            vision_sampler=vision_sampler,
            options=wire.image_options_to_proto(options),
            # What proves that this is the same node stays in this cluster.
            shelf=self._shelf.identity if self._shelf and self.address.target is None else "",
        )
        for attempt in range(self.address.attempts):
            timeout_s = deadline.remaining_s(self.address.timeout_s)
            try:
                async with self._line(timeout_s) as line:
                    stub = line.stub(encoder_pb2_grpc.EncoderServiceStub)
                    metadata = (*line.metadata, request_id_metadata())
                    response = await stub.Encode(request, timeout=timeout_s, metadata=metadata)
                self.heard_at = time.monotonic()
                tokens = response.visual_tokens
                if not tokens.shelf_name or (self._shelf and self._shelf.get(tokens.shelf_name)):
                    return tokens
                request.shelf, failure = "", StageUnavailable("an image's visual tokens are gone; try again")
            except StageUnavailable as lost:
                failure = lost
            await self._pause(attempt, failure, deadline)
        raise AssertionError("the last try raises")


class LanguageModelClient(_Stage):
    """Stage 2."""

    def __init__(
        self,
        address: StageAddress,
        metrics: Metrics,
        replicas: Replicas | None = None,
        shelf: Shelf | None = None,
    ):
        super().__init__("llm", address, metrics, replicas, shelf)
        self._known = KnownNames()

    async def check(self, model_fingerprint: str, timeout_s: float) -> None:
        """Raises FocusError unless a replica that serves this checkpoint answers within `timeout_s`, or none is needed
        now: a stage that was scaled to zero comes with the next call."""
        if await self._way.is_asleep():
            return
        request = llm_pb2.CheckLanguageModelRequest(model_fingerprint=model_fingerprint)
        async with self._line(timeout_s) as line:
            stub = line.stub(llm_pb2_grpc.LanguageModelServiceStub)
            await stub.CheckLanguageModel(request, timeout=timeout_s, metadata=line.metadata)
        self.heard_at = time.monotonic()

    async def generate(
        self, request: llm_pb2.GenerateRequest, deadline: Deadline, keys: Sequence[str] = ()
    ) -> AsyncGenerator[llm_pb2.GenerateResponse, None]:
        """The stage's events; closing the iterator cancels the call and so the generation.

        A stage lost before the first token is called again. After it, too, when the draws are repeatable (greedy, or a
        seed): the new stream's text and tokens must begin with what was sent, and only the rest is passed on.
        keys: what each image's visual tokens are known by here, so that a node is sent them once.
        """
        repeatable = request.sampling.temperature == 0 or request.sampling.HasField("seed")
        beginning = beginning_of(request, keys)
        answer, attempt = Replay(), 0
        # These stay until the end, should their files leave the shelf meanwhile.
        held = [self._shelf.get(image.shelf_name) for image in request.images if self._shelf and image.shelf_name]
        try:
            while True:
                try:
                    events = self._attempt(request, attempt, answer, deadline, keys, beginning)
                    async with contextlib.aclosing(events):
                        async for event in events:
                            yield event
                    return
                except NotOnShelf:  # nothing has come yet; sent whole, the request needs no shelf
                    self._known.forget(keys)
                    request = await asyncio.to_thread(self._whole, request)
                    continue
                except Overloaded:  # more of other gateways' calls are there than this one's told
                    if answer.begun or not self._way.has_room_elsewhere():
                        raise
                    continue
                except StageUnavailable as lost:
                    failure = lost
                    if answer.begun and not repeatable:
                        raise
                await self._pause(attempt, failure, deadline)
                attempt += 1
        finally:
            del held

    async def _attempt(
        self,
        request: llm_pb2.GenerateRequest,
        attempt: int,
        answer: Replay,
        deadline: Deadline,
        keys: Sequence[str],
        beginning: str,
    ) -> AsyncGenerator[llm_pb2.GenerateResponse, None]:
        answer.start_over()
        timeout_s = deadline.remaining_s(self.address.timeout_s)
        async with self._line(timeout_s, beginning) as line:
            sent = await self._for_node(request, line.shelf, keys)
            if attempt:  # the lost try may still be in flight under its own id
                sent = _copy(sent)
                sent.request_id = f"{request.request_id}.{attempt}"
            stub = line.stub(llm_pb2_grpc.LanguageModelServiceStub)
            call = stub.Generate(sent, timeout=timeout_s, metadata=(*line.metadata, request_id_metadata()))
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
                    if kind == "decision":
                        if not answer.decided:
                            answer.decided = True
                            yield event
                        continue
                    if kind == "error" and event.error.code == "UNAVAILABLE":
                        raise StageUnavailable(event.error.message)
                    ended = True
                    if kind == "finished":
                        answer.check_end()
                        if keys and line.shelf:
                            self._known.learn(line.shelf, keys, await call.trailing_metadata())
                    yield event
                    return
            finally:
                if not ended:
                    call.cancel()
            raise StageUnavailable(f"the {self.name} stage ended its stream early; try again")

    async def _for_node(
        self, request: llm_pb2.GenerateRequest, shelf: str, keys: Sequence[str]
    ) -> llm_pb2.GenerateRequest:
        """The request as a replica that sees this shelf takes it: what lies there is named."""
        near = self._shelf is not None and shelf == self._shelf.identity
        names = [self._known.name(shelf, key) for key in keys] if shelf and not near else []
        if names and all(names):
            named = _without_images(request)
            named.images.extend(encoder_pb2.CompressedVisualTokens(shelf_name=name) for name in names)
            return named
        if near or not any(image.shelf_name for image in request.images):
            return request
        return await asyncio.to_thread(self._whole, request)

    def _whole(self, request: llm_pb2.GenerateRequest) -> llm_pb2.GenerateRequest:
        """The request with all visual tokens in it. Raises UnusableVisualTokens where they are gone."""
        whole = _copy(request)
        for image in whole.images:
            if not wire.unshelve(image, self._shelf):
                raise UnusableVisualTokens("an image's visual tokens are gone; try again")
        return whole


def _copy(request: llm_pb2.GenerateRequest) -> llm_pb2.GenerateRequest:
    copy = llm_pb2.GenerateRequest()
    copy.CopyFrom(request)
    return copy


def _without_images(request: llm_pb2.GenerateRequest) -> llm_pb2.GenerateRequest:
    """A copy of all but the images, which may have 24 MB each."""
    fields = {field.name: value for field, value in request.ListFields() if field.name != "images"}
    return llm_pb2.GenerateRequest(**fields)
