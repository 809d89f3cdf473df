"""A stage's own port: strangers are refused, so many calls run and so many wait, and a call that ends makes room."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

import grpc
import grpc.aio
import pytest

from focusllava.errors import retry_after_s
from focusllava.v1 import encoder_pb2, encoder_pb2_grpc, llm_pb2, llm_pb2_grpc
from services.common.errors import InternalError, Overloaded
from services.common.grpc_status import refuse
from services.common.port import Places, StagePort
from services.common.stage_secret import SECRET_METADATA

TIMEOUT_S = 30


@dataclass
class Limits:
    max_ongoing_requests: int = 2
    max_queued_requests: int = 1


class Model:
    """A stage that answers while it is let."""

    def __init__(self) -> None:
        self.running, self.go_on, self.cancelled = 0, asyncio.Event(), 0

    async def Generate(self, request, context):
        if request.request_id == "bad":
            raise refuse(context, InternalError("internal error, request id bad"), "bad") from None
        self.running += 1
        try:
            yield llm_pb2.GenerateResponse(token=llm_pb2.Token(text=request.request_id))
            await self.go_on.wait()
            yield llm_pb2.GenerateResponse(finished=llm_pb2.Finished())
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def CheckLanguageModel(self, request, context):
        return llm_pb2.CheckLanguageModelResponse()


@contextlib.asynccontextmanager
async def listening(model: Model, limits: Limits):
    port = StagePort(
        model,
        llm_pb2_grpc.add_LanguageModelServiceServicer_to_server,
        lambda: limits,
        unlimited=("CheckLanguageModel",),
    )
    place = await port.start("127.0.0.1")
    try:
        async with asyncio.timeout(TIMEOUT_S), grpc.aio.insecure_channel(place["address"]) as channel:
            stub = llm_pb2_grpc.LanguageModelServiceStub(channel)
            stub.channel = channel
            yield port, stub, ((SECRET_METADATA, place["secret"]),)
    finally:
        await port.close(0)


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def asked(name: str = "r") -> llm_pb2.GenerateRequest:
    return llm_pb2.GenerateRequest(request_id=name)


@pytest.mark.parametrize("said", [(), ((SECRET_METADATA, ""),), ((SECRET_METADATA, "0" * 64),)])
async def test_a_stranger_reaches_no_method(said):
    model = Model()
    async with listening(model, Limits()) as (port, stub, _):
        for call in (stub.CheckLanguageModel(llm_pb2.CheckLanguageModelRequest(), metadata=said),
                     anext(aiter(stub.Generate(asked(), metadata=said)))):  # fmt: skip
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert model.running == port.places.taken == 0


async def test_what_a_stage_refuses_is_a_status_of_one_line():
    async with listening(Model(), Limits()) as (port, stub, known):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(stub.Generate(asked("bad"), metadata=known)))
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert caught.value.details() == "internal error, request id bad"
        assert port.places.taken == 0


async def test_a_request_that_is_no_protobuf_is_refused_in_our_words_and_a_stranger_is_told_nothing_of_it():
    model = Model()
    async with listening(model, Limits()) as (port, stub, known):
        service = "/focusllava.v1.LanguageModelService"
        for metadata, code, says in (
            (known, grpc.StatusCode.INVALID_ARGUMENT, "request: is no protobuf message"),
            ((), grpc.StatusCode.UNAUTHENTICATED, "is not this stage's"),
        ):
            calls = (
                stub.channel.unary_unary(f"{service}/CheckLanguageModel")(b"\xff\xff", metadata=metadata),
                anext(aiter(stub.channel.unary_stream(f"{service}/Generate")(b"\xff\xff", metadata=metadata))),
            )
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError, match=says) as caught:
                    await call
                assert caught.value.code() is code and "DecodeError" not in caught.value.details()
        assert model.running == port.places.taken == 0


async def test_so_many_run_so_many_wait_and_the_next_is_refused():
    model, limits = Model(), Limits()
    async with listening(model, limits) as (port, stub, known):
        calls = [stub.Generate(asked(str(number)), metadata=known) for number in range(3)]
        await until(lambda: port.places.taken == 3)
        assert model.running == 2
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(stub.Generate(asked(), metadata=known)))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "max_queued_requests" in caught.value.details() and retry_after_s(caught.value) == 1
        await stub.CheckLanguageModel(llm_pb2.CheckLanguageModelRequest(), metadata=known)  # needs no place
        model.go_on.set()
        for number, call in enumerate(calls):
            events = [event async for event in call]
            assert events[0].token.text == str(number) and events[-1].HasField("finished")
        await until(lambda: port.places.taken == 0)


async def test_a_cancelled_call_gives_its_place_to_one_that_waits():
    model = Model()
    async with listening(model, Limits(max_ongoing_requests=1, max_queued_requests=-1)) as (port, stub, known):
        first = stub.Generate(asked("a"), metadata=known)
        await anext(aiter(first))
        second = stub.Generate(asked("b"), metadata=known)
        await until(lambda: port.places.taken == 2)
        third = stub.Generate(asked("c"), metadata=known)
        await until(lambda: port.places.taken == 3)
        second.cancel()
        await until(lambda: port.places.taken == 2)
        first.cancel()
        assert (await anext(aiter(third))).token.text == "c"
        await until(lambda: model.cancelled == 1)
        third.cancel()
        await until(lambda: port.places.taken == 0 and model.running == 0)


async def test_a_port_that_closes_finishes_its_calls_and_takes_no_other():
    model = Model()
    async with listening(model, Limits()) as (port, stub, known):
        events = aiter(stub.Generate(asked(), metadata=known))
        await anext(events)
        closing = asyncio.create_task(port.close(TIMEOUT_S))
        await until(lambda: port.is_closing)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(stub.Generate(asked(), metadata=known)))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not closing.done()
        model.go_on.set()
        assert (await anext(events)).HasField("finished")
        await closing


async def test_a_unary_method_is_served_too():
    class Encoder:
        async def Encode(self, request, context):
            return encoder_pb2.EncodeResponse(visual_tokens={"map_width": 7})

        async def CheckEncoder(self, request, context):
            return encoder_pb2.CheckEncoderResponse()

    port = StagePort(Encoder(), encoder_pb2_grpc.add_EncoderServiceServicer_to_server, Limits)
    place = await port.start("127.0.0.1")
    async with grpc.aio.insecure_channel(place["address"]) as channel:
        stub = encoder_pb2_grpc.EncoderServiceStub(channel)
        answer = await stub.Encode(encoder_pb2.EncodeRequest(), metadata=((SECRET_METADATA, place["secret"]),))
    assert answer.visual_tokens.map_width == 7
    await port.close(0)


async def test_a_place_given_to_a_caller_that_leaves_at_that_moment_is_given_on():
    places = Places(lambda: Limits(max_ongoing_requests=1, max_queued_requests=-1))
    entered: list[str] = []

    async def use(name: str, leave: asyncio.Event) -> None:
        async with places.one():
            entered.append(name)
            await leave.wait()

    leave = asyncio.Event()
    async with places.one():
        waiting = [asyncio.create_task(use(name, leave)) for name in ("second", "third")]
        await asyncio.sleep(0)
    waiting[0].cancel()  # the place is the second's by now, who has not run yet
    await until(lambda: entered == ["third"] and places.taken == 1)
    leave.set()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert waiting[0].cancelled() and places.taken == 0


async def test_a_limit_that_is_raised_holds_from_the_next_end_on():
    limits = Limits(max_ongoing_requests=1, max_queued_requests=0)
    places = Places(lambda: limits)
    async with places.one():
        with pytest.raises(Overloaded):
            async with places.one():
                pass
        limits.max_ongoing_requests = 2
        async with places.one():
            assert places.taken == 2


async def test_a_caller_that_leaves_as_a_place_comes_free_is_passed_over():
    places = Places(lambda: Limits(max_ongoing_requests=1, max_queued_requests=-1))

    async def call(leave: asyncio.Event):
        async with places.one():
            await leave.wait()

    first_leaves, never = asyncio.Event(), asyncio.Event()
    first = asyncio.create_task(call(first_leaves))
    await asyncio.sleep(0)
    second = asyncio.create_task(call(never))
    await asyncio.sleep(0)
    first_leaves.set()
    second.cancel()  # its place is given up, and passed over by the first call's end before the second sees it
    ends = await asyncio.gather(first, second, return_exceptions=True)
    assert ends[0] is None and isinstance(ends[1], asyncio.CancelledError), ends
    assert places.taken == 0
