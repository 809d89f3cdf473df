"""What stands around the handlers of Ray's proxy, on Ray's own gRPC server and a real socket; no Ray runs."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import grpc.aio
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from ray.serve._private.grpc_util import gRPCGenericServer
from ray.serve._private.proxy_request_response import gRPCStreamingType
from ray.serve.exceptions import BackPressureError

from cluster.ingress import add_services_to_server
from focusllava.errors import retry_after_s
from focusllava.v1 import encoder_pb2, encoder_pb2_grpc, focus_pb2, focus_pb2_grpc, llm_pb2, llm_pb2_grpc
from services.common import tracing
from tests.serving_client import LEAKS

DIED = """The actor died unexpectedly before finishing this task.
\tclass_name: ServeReplica:gateway:Gateway
\tactor_id: 9cb99581026aa6f11f55f0b301000000
\tpid: 12950"""
NO_METHOD = """ray::ServeReplica:llm:LanguageModel.handle_request_with_rejection() (pid=13776, ip=192.0.2.2, id=2)
  File "/x/ray/serve/_private/replica.py", line 3900, in get_user_method_info
ray.serve.exceptions.RayServeException: Tried to call a method 'Encode' that does not exist. Available methods: []."""
APPLICATION = (("application", "llm"),)


class Placeholder(
    focus_pb2_grpc.FocusServiceServicer,
    encoder_pb2_grpc.EncoderServiceServicer,
    llm_pb2_grpc.LanguageModelServiceServicer,
):
    """What Ray hands over; it is never called."""


class Ray:
    """Handlers as Ray's proxy makes them: the status in the context, a cancellation heard only in a wait."""

    broken = False

    def __init__(self, status: tuple[grpc.StatusCode, str] | None = None, events: int = 3, wait_s: float = 0.0):
        self.status, self.events, self.wait_s = status, events, wait_s
        self.cancelled, self.ended = 0, asyncio.Event()

    def factory(self, service_method: str, streaming_type: gRPCStreamingType):
        async def unary_unary(request, context):
            self.end(context)
            return encoder_pb2.EncodeResponse().SerializeToString()

        async def unary_stream(request, context):
            for number in range(self.events):
                try:
                    await asyncio.sleep(self.wait_s)
                except asyncio.CancelledError:
                    self.cancelled += 1
                    context.peer()  # Ray's access log reads it
                    self.ended.set()
                    return
                yield llm_pb2.GenerateResponse(token=llm_pb2.Token(token_ids=[number])).SerializeToString()
            self.end(context)

        return unary_stream if streaming_type is gRPCStreamingType.UNARY_STREAM else unary_unary

    def end(self, context) -> None:
        self.ended.set()
        if self.broken:
            raise RuntimeError("/srv/ray/proxy.py: no status")
        if self.status:
            context.set_code(self.status[0])
            context.set_details(self.status[1])


@contextlib.asynccontextmanager
async def serving(ray: Ray):
    server = gRPCGenericServer(ray.factory)
    add_services_to_server(Placeholder(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(0)


@pytest.fixture(autouse=True)
def other_servers_stay_as_they_are(monkeypatch):
    monkeypatch.setattr("cluster.ingress.bound_http", lambda: None)
    monkeypatch.setattr("cluster.ingress.set_up_logs", lambda environment: None)


@pytest.mark.parametrize(
    "status, code, says",
    [
        (
            (grpc.StatusCode.INTERNAL, "The actor 66 is unavailable: Actor is unavailable.. The task may"),
            "UNAVAILABLE",
            "the llm replica that had this request is gone; try again",
        ),
        ((grpc.StatusCode.INTERNAL, DIED), "UNAVAILABLE", "the llm replica that had this request is gone; try again"),
        ((grpc.StatusCode.INTERNAL, NO_METHOD), "UNIMPLEMENTED", "Encode is not a method of the application 'llm'"),
        ((grpc.StatusCode.INTERNAL, "ray::f() (pid=3)\nTraceback"), "INTERNAL", "internal error"),
        ((grpc.StatusCode.INTERNAL, "internal error, request id 7"), "INTERNAL", "internal error, request id 7"),
        ((grpc.StatusCode.INVALID_ARGUMENT, "turns: is empty"), "INVALID_ARGUMENT", "turns: is empty"),
        (
            (grpc.StatusCode.RESOURCE_EXHAUSTED, BackPressureError(9, 8).message),
            "RESOURCE_EXHAUSTED",
            "the llm application is full (max_queued_requests); try again later",
        ),
        ((grpc.StatusCode.RESOURCE_EXHAUSTED, "image: too large"), "RESOURCE_EXHAUSTED", "image: too large"),
        (
            (grpc.StatusCode.RESOURCE_EXHAUSTED, "the server is full (in 2.5 s)"),
            "RESOURCE_EXHAUSTED",
            "the server is full (in 2.5 s)",
        ),
    ],
)
async def test_a_status_tells_what_to_do_and_no_internals(status, code, says):
    async with serving(Ray(status)) as channel:
        encoder = encoder_pb2_grpc.EncoderServiceStub(channel)
        model = llm_pb2_grpc.LanguageModelServiceStub(channel)
        with pytest.raises(grpc.RpcError) as unary:
            await encoder.Encode(encoder_pb2.EncodeRequest(), metadata=APPLICATION)
        seen = []
        with pytest.raises(grpc.RpcError) as streamed:
            async for event in model.Generate(llm_pb2.GenerateRequest(), metadata=APPLICATION):
                seen.append(event.token.token_ids[0])
    assert seen == [0, 1, 2]  # what came before the failure came through
    for caught in (unary, streamed):
        assert (caught.value.code().name, caught.value.details()) == (code, says)
        assert not LEAKS.search(caught.value.details())
        when = 2.5 if "2.5 s" in says else 1 if "try again later" in says else None
        assert retry_after_s(caught.value) == when


async def test_a_handler_that_fails_tells_nothing_either():
    ray = Ray()
    ray.broken = True
    async with serving(ray) as channel:
        encoder = encoder_pb2_grpc.EncoderServiceStub(channel)
        model = llm_pb2_grpc.LanguageModelServiceStub(channel)
        with pytest.raises(grpc.RpcError) as unary:
            await encoder.Encode(encoder_pb2.EncodeRequest(), metadata=APPLICATION)
        with pytest.raises(grpc.RpcError) as streamed:
            _ = [event async for event in model.Generate(llm_pb2.GenerateRequest(), metadata=APPLICATION)]
    for caught in (unary, streamed):
        assert (caught.value.code().name, caught.value.details()) == ("INTERNAL", "internal error")


async def test_a_request_that_is_no_protobuf_is_refused_in_our_words():
    ray = Ray()
    async with serving(ray) as channel:
        unary = channel.unary_unary("/focusllava.v1.EncoderService/Encode")(b"\xff\xff", metadata=APPLICATION)
        streamed = channel.unary_stream("/focusllava.v1.FocusService/Chat")(b"\xff\xff", metadata=APPLICATION)
        for call in (unary, anext(aiter(streamed))):
            with pytest.raises(grpc.RpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert caught.value.details().startswith("request: is no protobuf message")
    assert not ray.ended.is_set(), "Ray's handler has not heard of it"


async def test_every_method_of_the_three_services_is_there_and_streams():
    async with serving(Ray(events=200)) as channel:
        call = focus_pb2_grpc.FocusServiceStub(channel).Chat(focus_pb2.ChatRequest(), metadata=APPLICATION)
        assert len([event async for event in call]) == 200
        stub = llm_pb2_grpc.LanguageModelServiceStub(channel)
        answer = [event async for event in stub.Generate(llm_pb2.GenerateRequest(), metadata=APPLICATION)]
        assert [event.token.token_ids[0] for event in answer] == list(range(200))


async def test_a_call_cancelled_at_any_moment_is_cancelled_at_the_replica():
    """Calls are cancelled at the start, after some tokens, and while tokens come as fast as they can be written."""
    for wait_s, read in [(0.01, 0), (0.01, 2), (0.0001, 1), (0.0001, 5)] * 10:
        ray = Ray(events=10**9, wait_s=wait_s)
        async with serving(ray) as channel:
            call = llm_pb2_grpc.LanguageModelServiceStub(channel).Generate(
                llm_pb2.GenerateRequest(), metadata=APPLICATION
            )
            for _ in range(read):
                await call.read()
            if not read:
                await asyncio.sleep(0.02)
            call.cancel()
            await asyncio.wait_for(ray.ended.wait(), 5)
            assert ray.cancelled == 1


async def test_a_call_of_a_stage_is_a_span_of_its_callers_trace():
    exporter = InMemorySpanExporter()
    tracing.set_up_traces({}, "test", exporter)
    try:
        traced = (*APPLICATION, ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"))
        async with serving(Ray()) as channel:
            model = llm_pb2_grpc.LanguageModelServiceStub(channel)
            assert len([event async for event in model.Generate(llm_pb2.GenerateRequest(), metadata=traced)]) == 3
            await encoder_pb2_grpc.EncoderServiceStub(channel).Encode(encoder_pb2.EncodeRequest(), metadata=traced)
    finally:
        tracing._tracer = None
    spans = exporter.get_finished_spans()
    assert [span.name.rpartition(".")[2] for span in spans] == [
        "LanguageModelService/Generate",
        "EncoderService/Encode",
    ]
    for span in spans:
        assert span.parent.span_id == 0xB7AD6B7169203331 and span.attributes == {"focusllava.application": "llm"}
