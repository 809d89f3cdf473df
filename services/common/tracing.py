"""Traces of OpenTelemetry, where they are wanted: spans of a request from its client through the gateway to the stages.

W3C's `traceparent`, in headers and metadata, makes one trace of them.

The SDK's own variable OTEL_EXPORTER_OTLP_ENDPOINT turns them on, and the SDK reads its other variables too. Without it
nothing of OpenTelemetry is imported, and all here does nothing. No span holds what was asked or answered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import grpc
import grpc.aio

from services.common.call_metadata import text_metadata
from services.common.errors import InvalidInput

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""Variables of the environment with the address of a collector, which speaks OTLP over HTTP."""
INSTALL = "pip install 'focusllava[trace]'"

_tracer: Any = None
"""OpenTelemetry's tracer; None where nothing is traced."""


def set_up_traces(environment: Mapping[str, str], service: str, exporter: Any = None) -> None:
    """Has this process trace as `service`, where the environment names a collector or an exporter is given.

    Raises InvalidInput where a collector is named and OpenTelemetry is not installed.
    """
    global _tracer
    if exporter is None and not any(environment.get(name) for name in ENDPOINTS):
        return
    try:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

        if exporter is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            processor: Any = BatchSpanProcessor(OTLPSpanExporter())
        else:
            processor = SimpleSpanProcessor(exporter)
    except ModuleNotFoundError as error:
        raise InvalidInput(f"is set, which needs {error.name}: {INSTALL}", field=ENDPOINTS[0]) from None
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: f"focusllava-{service}"}))
    provider.add_span_processor(processor)
    _tracer = provider.get_tracer("focusllava")


def join_trace(carrier: Mapping[str, str]) -> None:
    """Has this task's next span belong to the trace that a caller's headers or metadata name, else to a new one."""
    if _tracer is not None:
        from opentelemetry import context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context.attach(TraceContextTextMapPropagator().extract(carrier, context.Context()))


@contextlib.contextmanager
def span(name: str, kind: str = "SERVER", **attributes: Any) -> Iterator[dict[str, Any]]:
    """A span from here to the end of the block, below this task's current one, and current itself from now on.

    It yields a dictionary for attributes that are known at the end only. The task's context is left as it is then: a
    generator may be closed by another task, and every request has one of its own.
    """
    if _tracer is None:
        yield {}
        return
    from opentelemetry import context, trace

    found = _tracer.start_span(name, kind=trace.SpanKind[kind], attributes=_stated(attributes))
    context.attach(trace.set_span_in_context(found))
    later: dict[str, Any] = {}
    try:
        yield later
    except Exception as error:
        found.set_status(trace.StatusCode.ERROR, type(error).__name__)
        raise
    finally:
        found.set_attributes(_stated(later))
        found.end()


def channel_interceptors() -> Sequence[Any]:
    """Interceptors of a channel, which give each call a span and send its trace along; none where nothing is traced."""
    return [_UnaryCalls(), _StreamCalls()] if _tracer is not None else []


def server_interceptors() -> Sequence[Any]:
    """Interceptors of a server, which give each call a span in its caller's trace; none where nothing is traced."""
    return [_Served()] if _tracer is not None else []


def _stated(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {f"focusllava.{name}": value for name, value in attributes.items() if value not in ("", None)}


class _Calls:
    """What both kinds of calls share: the span and the metadata of one call."""

    async def _call(self, continuation: Callable[..., Awaitable[Any]], details: Any, request: Any) -> Any:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        method = details.method.decode() if isinstance(details.method, bytes) else details.method
        found = _tracer.start_span(method.lstrip("/"), kind=trace.SpanKind.CLIENT)
        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, trace.set_span_in_context(found))
        metadata = grpc.aio.Metadata(*(details.metadata or ()), *carrier.items())
        call = await continuation(details._replace(metadata=metadata), request)
        call.add_done_callback(lambda _: found.end())
        return call


class _UnaryCalls(_Calls, grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._call(continuation, client_call_details, request)


class _StreamCalls(_Calls, grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[misc]
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._call(continuation, client_call_details, request)


class _Served(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        name = handler_call_details.method.lstrip("/")
        if handler is None or handler.request_streaming:
            return handler

        async def unary(request: Any, context: grpc.aio.ServicerContext) -> Any:
            join_trace(text_metadata(context))
            with span(name):
                return await handler.unary_unary(request, context)

        async def stream(request: Any, context: grpc.aio.ServicerContext) -> Any:
            join_trace(text_metadata(context))
            with span(name):
                async for message in handler.unary_stream(request, context):
                    yield message

        make = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
        behaviour = stream if handler.response_streaming else unary
        return make(behaviour, handler.request_deserializer, handler.response_serializer)
