"""The engine on a thread of its own, requests and events as asyncio sees them."""

from __future__ import annotations

import asyncio
import functools
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from services.common.errors import FocusError, InternalError, Overloaded, StageUnavailable
from services.common.logs import LOGGER
from services.common.types import Constraint, GenerateRequest
from services.llm.engine import Engine
from services.llm.engine_stats import EngineStats, Event, StepFailed
from services.llm.event_stream import EventStream, gathering_s, is_last
from services.llm.sequence import Sequence

MOST_FAILED_STEPS = 3
"""Failed steps beyond which, with no request that ended well between, a replica is unwell. It fails requests faster
than others answer theirs, so it would get most of the traffic."""
MOST_COMPILING = 64
"""Most constraints that wait to be compiled; one takes some milliseconds, a hostile one up to 4 s."""

INTAKE_THREADS = 2
"""Threads that take requests in. Each keeps the memory of its largest request (`services/compute/malloc.py`), and the
tokenizer serves one at a time."""

Given = ParamSpec("Given")
Result = TypeVar("Result")

logger = logging.getLogger(LOGGER)


class AsyncEngine:
    """Owns the engine: nobody else may call it (but for `prepare` and `stats`).

    The thread outlives every failure: a request whose end is not told would wait for ever.
    """

    def __init__(self, engine: Engine, *, gather_s: float = 0.0):
        """gather_s: longest that a token waits for those after it (`services/llm/event_stream.py`)."""
        self.engine, self._gather_s = engine, gather_s
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[str, EventStream] = {}  # touched by the engine's thread only
        # On a thread of its own: what takes long to compile must not hold the threads that all requests need.
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="llm-constraints")
        self._compiling = 0
        self._inbox_lock = threading.Lock()
        self._closing = False
        self._intake = ThreadPoolExecutor(INTAKE_THREADS, thread_name_prefix="intake")
        self._thread = threading.Thread(target=self._run, name="llm-engine", daemon=True)
        self._thread.start()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event]:
        """Events of one or more tokens, then one finished event. Closing or cancelling the iterator aborts the request.

        Raises before the first event what `Engine.submit` raises; after it InternalError when a pass failed, or
        StageUnavailable when the engine is closed.
        """
        if request.sampling.constraint is not None:
            await self._compile(request.sampling.constraint)
        sequence = await self.take_in(self.engine.prepare, request)
        stream = EventStream()
        self._post(lambda: self._enqueue(sequence, stream))
        ended = False
        try:
            while not ended:
                for event in await stream.take():
                    ended = is_last(event)
                    if isinstance(event, FocusError):
                        raise event
                    yield event
        finally:
            stream.close()
            if not ended:
                self._inbox.put(lambda: self._abort(request.request_id, stream))

    async def _compile(self, constraint: Constraint) -> None:
        grammars = self.engine.grammars
        if grammars.known(constraint) is not None:
            return
        if self._compiling >= MOST_COMPILING:
            raise Overloaded(f"{self._compiling} others wait to be compiled", field="sampling.constraint")
        self._compiling += 1
        try:
            await self._on(self._compiler, grammars.compile, constraint)
        finally:
            self._compiling -= 1

    async def take_in(self, work: Callable[Given, Result], *given: Given.args, **named: Given.kwargs) -> Result:
        """Does a part of a request's intake off the event loop; a caller cancelled before its turn costs nothing.

        Raises StageUnavailable when the engine is closed.
        """
        return await self._on(self._intake, work, *given, **named)

    async def _on(
        self, threads: ThreadPoolExecutor, work: Callable[Given, Result], *given: Given.args, **named: Given.kwargs
    ) -> Result:
        with self._inbox_lock:
            if self._closing:
                raise _shutting_down()
            taken = threads.submit(work, *given, **named)
        try:
            return await asyncio.wrap_future(taken)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise _shutting_down() from None  # nobody cancelled the caller: `close` cancelled what waited for a thread

    def stats(self) -> EngineStats:
        return self.engine.stats()

    def check(self) -> None:
        """Raises RuntimeError when no request can be answered: the thread is gone, or step after step fails."""
        if not self._thread.is_alive():
            raise RuntimeError("the engine's thread has ended")
        failed = self.engine.stats().failed_steps
        if failed > MOST_FAILED_STEPS:
            raise RuntimeError(f"{failed} steps failed since a request last ended well")

    def close(self) -> None:
        """Ends every request with StageUnavailable and joins the thread."""
        with self._inbox_lock:
            self._closing = True
            self._inbox.put(lambda: None)
        self._thread.join()
        self._compiler.shutdown(wait=False, cancel_futures=True)
        self.engine.grammars.close()
        self._intake.shutdown(wait=False)

    def _post(self, request: Callable[[], None]) -> None:
        with self._inbox_lock:
            if self._closing:
                raise _shutting_down()
            self._inbox.put(request)

    # The rest runs on the engine's thread.

    def _run(self) -> None:
        while not self._closing:
            try:
                self._turn()
            except Exception:
                logger.exception("the engine failed outside of a pass; every request ends with an error")
                self._end_all(_failed())
        while not self._inbox.empty():  # what has just arrived ends as well
            self._guarded(self._inbox.get())
        self._end_all(_shutting_down())

    def _turn(self) -> None:
        if not self.engine.has_work():
            self._inbox.get()()
        while not self._inbox.empty():
            self._inbox.get()()
        try:
            self._deliver(self.engine.step())
        except StepFailed as error:
            logger.exception("a step failed; requests %s end with an error", ", ".join(error.request_ids))
            self._deliver([*error.events, *((request_id, error) for request_id in error.request_ids)])

    def _enqueue(self, sequence: Sequence, stream: EventStream) -> None:
        try:
            self.engine.enqueue(sequence)
        except FocusError as error:
            self._send({stream: [error]})
        except Exception:
            logger.exception("request %s could not be queued", sequence.request_id)
            self._send({stream: [_failed()]})
        else:
            self._streams[sequence.request_id] = stream

    def _abort(self, request_id: str, stream: EventStream) -> None:
        # Another request may bear this id by now, or may have been refused for bearing it.
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            self.engine.abort(request_id)

    def _end_all(self, error: FocusError) -> None:
        """Raises nothing: it is the last resort. The requests are told first, for what follows may fail as well."""
        request_ids = list(self._streams)
        self._deliver([(request_id, error) for request_id in request_ids])
        for request_id in request_ids:
            # A step that was planned and not carried out has named blocks that hold nothing: nobody may find them.
            self._guarded(functools.partial(self.engine.abort, request_id, broken=True))

    def _guarded(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception:
            logger.exception("the engine could not clean up after a request")

    def _deliver(self, events: Iterable[tuple[str, Event | FocusError]]) -> None:
        by_stream: dict[EventStream, list[Event | FocusError]] = {}
        for request_id, event in events:
            stream = self._streams.get(request_id)
            if stream is not None:
                by_stream.setdefault(stream, []).append(event)
                if is_last(event):
                    del self._streams[request_id]
        self._send(by_stream)

    def _send(self, by_stream: dict[EventStream, list[Event | FocusError]]) -> None:
        """One wake-up of each event loop for all that a pass brought."""
        gather_s = gathering_s(self._gather_s, len(self._streams))
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[EventStream, Event | FocusError]]] = {}
        for stream, events in by_stream.items():
            by_loop.setdefault(stream.loop, []).extend((stream, event) for event in events)
        for loop, batch in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, batch, gather_s)
            except RuntimeError:  # the loop is closed: nobody listens any more
                for request_id in [r for r, s in self._streams.items() if s.loop is loop]:
                    del self._streams[request_id]
                    self._guarded(functools.partial(self.engine.abort, request_id))


def _failed() -> InternalError:
    return InternalError("the language model failed on this request; try again, and see the server's log")


def _shutting_down() -> StageUnavailable:
    return StageUnavailable("the language model is shutting down")


def _put_all(batch: list[tuple[EventStream, Event | FocusError]], gather_s: float) -> None:
    for stream, event in batch:
        stream.put(event, gather_s)
