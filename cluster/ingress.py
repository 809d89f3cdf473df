"""What this project adds to Ray Serve's proxy: `grpc_servicer_functions: [cluster.ingress.add_services_to_server]`.

The function runs inside the proxy's process, before its servers take a connection. Ray's handlers stay, and route as
ever; around them stand three things that Ray leaves out:

- No status tells internals. Ray writes an exception of its own with pid, address, actor id and traceback, and gRPC
  Python's words where a request is no protobuf.
- A cancelled call is cancelled. Ray's handler hears of it only while it waits for the replica: a client that leaves
  while a message is being written would be answered to the end, for nobody.
- HTTP connections are bounded in number and time (`cluster/http_bounds.py`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import resource
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import grpc

from cluster.http_bounds import RETRY_AFTER_S, bound_http
from focusllava.v1 import encoder_pb2_grpc, focus_pb2_grpc, llm_pb2_grpc
from services.common.call_metadata import text_metadata
from services.common.errors import InvalidInput
from services.common.grpc_status import one_line, refuse, replica_is_lost, split_wait, tell_retry
from services.common.logs import LOGGER, set_up_logs
from services.common.tracing import join_trace, set_up_traces, span
from services.common.unreadable import check_readable, reads_safely

_log = logging.getLogger(LOGGER)

MOST_FILES = 65_536
"""What the proxy's limit of open files is raised to, where the hard limit has room."""
_NO_METHOD = re.compile(r"Tried to call a method '(\w+)' that does not exist")


def add_services_to_server(servicer: Any, server: Any) -> None:
    """Adds the three services to the gRPC server of Ray's proxy; `servicer` is Ray's placeholder."""
    _raise_file_limit()
    set_up_logs(os.environ)
    set_up_traces(os.environ, "proxy")
    bound_http()
    server.service_handler_factory = guarded(server.service_handler_factory)
    reading = _SafelyReadingServer(server)
    for add in (
        focus_pb2_grpc.add_FocusServiceServicer_to_server,
        encoder_pb2_grpc.add_EncoderServiceServicer_to_server,
        llm_pb2_grpc.add_LanguageModelServiceServicer_to_server,
    ):
        add(servicer, reading)  # type: ignore[no-untyped-call]


class _SafelyReadingServer:
    """Ray's server, to which generated code adds methods that read their requests safely."""

    def __init__(self, server: Any):
        self._server = server

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[Any]) -> None:
        for generic in generic_rpc_handlers:
            generic._method_handlers = _read_safely(generic._method_handlers)  # where Ray finds them, too
        self._server.add_generic_rpc_handlers(generic_rpc_handlers)

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, Any]) -> None:
        self._server.add_registered_method_handlers(service_name, _read_safely(method_handlers))


def _read_safely(handlers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: reads_safely(handler) for name, handler in handlers.items()}


def guarded(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps Ray's factory of handlers, so that unary and server-streaming ones are guarded; we have no others."""

    def make(service_method: str, streaming_type: Any) -> Any:
        handler = factory(service_method=service_method, streaming_type=streaming_type)

        async def unary_unary(request: Any, context: Any) -> Any:
            with _span(context, service_method):
                try:
                    check_readable(request)
                    response = await handler(request, context)
                except InvalidInput as error:
                    refuse(context, error)
                    return b""
                except Exception as error:
                    response = _failed(context, service_method, error)
                clean_status(context, service_method)
            return response

        async def unary_stream(request: Any, context: Any) -> None:
            with _span(context, service_method):
                try:
                    check_readable(request)
                except InvalidInput as error:
                    refuse(context, error)
                    return
                await passed_on(request, context)

        async def passed_on(request: Any, context: Any) -> None:
            messages: asyncio.Queue[Any] = asyncio.Queue()
            pump = asyncio.create_task(_pump(handler(request, context), messages))
            pump.add_done_callback(lambda _: messages.put_nowait(None))
            try:
                while (message := await messages.get()) is not None:
                    await context.write(message)
                if error := pump.exception():
                    _failed(context, service_method, error)
            finally:
                # Without a client left, this cancels Ray's handler, which waits for the replica whenever it is not
                # writing; else it has ended already. Its last log line reads the call, which ends with this handler.
                pump.cancel()
                await asyncio.wait([pump])
            clean_status(context, service_method)

        return {"UNARY_UNARY": unary_unary, "UNARY_STREAM": unary_stream}.get(streaming_type.name, handler)

    return make


def _span(context: Any, service_method: str) -> AbstractContextManager[Any]:
    """A call's span in its caller's trace: at the stages, their part of it."""
    join_trace(text_metadata(context))
    return span(service_method.lstrip("/"), application=_application(context))


def _failed(context: Any, service_method: str, error: BaseException) -> bytes:
    """Answers where Ray's own handler failed: gRPC would send the client the exception's text."""
    _log.error("%s: the proxy failed", service_method, exc_info=error)
    context.set_code(grpc.StatusCode.INTERNAL)
    context.set_details("internal error")
    return b""


async def _pump(answer: AsyncIterator[Any], messages: asyncio.Queue[Any]) -> None:
    async for message in answer:
        messages.put_nowait(message)


def clean_status(context: Any, service_method: str) -> None:
    """Replaces a status that Ray wrote from an exception by one of ours."""
    code, details = context.code(), context.details() or ""
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        _, wait_s = split_wait(details)
        if wait_s is None and "max_queued_requests" in details:  # Ray itself refused
            wait_s = RETRY_AFTER_S
            full = f"the {_application(context)} application is full (max_queued_requests); try again later"
            context.set_details(full)
        if wait_s is not None:
            tell_retry(context, wait_s)
        return
    if code is not grpc.StatusCode.INTERNAL:  # Ray's other statuses have a fitting code and no internals
        return
    application = _application(context)
    if missing := _NO_METHOD.search(details):
        code, said = grpc.StatusCode.UNIMPLEMENTED, f"{missing[1]} is not a method of the application {application!r}"
    elif replica_is_lost(details):
        code, said = grpc.StatusCode.UNAVAILABLE, f"the {application} replica that had this request is gone; try again"
    elif details != one_line(details) or "ray::" in details:  # ours have one line
        said = "internal error"
    else:
        return
    _log.warning("%s at %s: %s; Ray says: %s", service_method, application, said, one_line(details))
    context.set_code(code)
    context.set_details(said)


def _application(context: Any) -> str:
    """The application that the caller named, as fit for a line."""
    return one_line(text_metadata(context).get("application", ""))[:60]


def _raise_file_limit() -> None:
    """Raises this process's soft limit of open files as far as it may: a connection of either kind takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < MOST_FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (MOST_FILES if hard < 0 else min(MOST_FILES, hard), hard))
