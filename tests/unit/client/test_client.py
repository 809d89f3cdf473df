"""The clients against a scripted gateway on a real socket: stream, settings, retry, deadline, cancel, errors."""

from __future__ import annotations

import asyncio
import io
import socket
import threading
import time
from collections.abc import Iterator

import grpc
import pytest
from PIL import Image, ImageCms, ImageOps

from focusllava import (
    AsyncFocusClient,
    FocusClient,
    FocusClientError,
    ImageFile,
    RetryPolicy,
    TokenLogprob,
    Turn,
    assistant,
    system,
    user,
)
from focusllava.messages import read_image
from focusllava.v1 import image_pb2, llm_pb2
from tests.fakes.gateway import ScriptedGateway, failed, finished, likely, started, token

QUICK = RetryPolicy(attempts=3, first_delay_s=0.01)


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    gateway = ScriptedGateway()
    yield gateway
    gateway.stop()


@pytest.fixture
def client(gateway: ScriptedGateway) -> Iterator[FocusClient]:
    with FocusClient(gateway.address, timeout_s=20, retry=QUICK) as client:
        yield client


def test_streams_text_then_accounting(client: FocusClient) -> None:
    stream = client.ask(b"png", "What is it?")
    assert stream.usage is None
    assert list(stream) == ["a ", "red ", "café"]  # an event without text is no piece
    answer = stream.result()
    assert answer.text == stream.text == "a red café"
    assert answer.finish_reason == "stop"
    assert (answer.usage.visual_tokens_uncompressed, answer.usage.visual_tokens_kept) == (100, 20)
    assert answer.usage.kv_unpruned_bytes == 4096
    assert answer.images[0].notes == ("animated image: first frame used",)
    assert answer.request_id == "r1"


def test_settings_reach_the_wire_and_absent_ones_stay_unset(client: FocusClient, gateway: ScriptedGateway) -> None:
    client.ask(
        b"i", "q", threshold=0.5, vision_sampler=False, text_sampler=False, max_tokens=7, seed=3, stop=["."]
    ).result()
    client.ask(None, "q").result()
    full, bare = gateway.requests
    assert full.vision_sampler_off and full.prune.off and full.prune.threshold == 0.5
    assert (full.sampling.max_tokens, full.sampling.seed, list(full.sampling.stop)) == (7, 3, ["."])
    assert not full.sampling.HasField("temperature")
    assert not bare.vision_sampler_off and not bare.prune.off and not bare.prune.HasField("threshold")
    assert bare.sampling == llm_pb2.SamplingParams() and bare.prune == llm_pb2.PruneParams()
    assert [part.WhichOneof("part") for part in bare.turns[0].parts] == ["text"]


def test_every_setting_reaches_the_wire(client: FocusClient, gateway: ScriptedGateway) -> None:
    sampling = {
        "max_tokens": 9, "temperature": 0.5, "top_k": 3, "top_p": 0.25, "min_p": 0.125, "repetition_penalty": 1.5,
        "presence_penalty": -1.0, "frequency_penalty": 0.5, "seed": 2**64 - 1, "logprobs": 0, "ignore_eos": True,
    }  # fmt: skip
    client.ask(None, "q", keep_ratio=0.5, threshold=None, **sampling).result()
    client.ask(None, "q", **dict.fromkeys(sampling)).result()
    full, none = gateway.requests
    assert full.prune == llm_pb2.PruneParams(keep_ratio=0.5)
    assert {field.name: value for field, value in full.sampling.ListFields()} == sampling
    assert none.sampling == llm_pb2.SamplingParams()
    with pytest.raises(TypeError, match="unknown settings: top_q"):
        client.ask(None, "q", top_q=3)


def test_log_probabilities_come_as_they_are_generated(client: FocusClient, gateway: ScriptedGateway) -> None:
    gateway.script = lambda request, context: iter([started(), *map(likely, ("a", "", "b")), finished()])
    stream = client.ask(None, "q", logprobs=1)
    seen = []
    for _ in stream:
        seen.append(len(stream.logprobs))
    assert seen == [1, 3]
    answer = stream.result()
    assert [entry.chosen.text for entry in answer.logprobs] == ["a", "", "b"] and answer.logprobs == stream.logprobs
    assert answer.logprobs[0].chosen == TokenLogprob(token_id=1, text="a", logprob=-0.25)
    assert answer.logprobs[0].top[1] == TokenLogprob(token_id=2, text="z", logprob=-1.5)
    gateway.script = gateway.answer
    assert client.ask(None, "q").result().logprobs == ()


def test_image_sources_and_chat_turns(client: FocusClient, gateway: ScriptedGateway, tmp_path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(b"from a file")
    images = [str(path), path, b"bytes", io.BytesIO(b"file-like")]
    history = [system("Be brief."), user("First?"), assistant("Yes.")]
    client.ask(images, "And these?", history=history).result()
    turns = gateway.requests[0].turns
    assert [turn.role for turn in turns] == [
        llm_pb2.ROLE_SYSTEM, llm_pb2.ROLE_USER, llm_pb2.ROLE_ASSISTANT, llm_pb2.ROLE_USER,
    ]  # fmt: skip
    last = turns[-1].parts
    assert [part.image for part in last[:4]] == [b"from a file", b"from a file", b"bytes", b"file-like"]
    assert last[4].text == "And these?"


def test_how_images_are_read_reaches_the_wire(client: FocusClient, gateway: ScriptedGateway) -> None:
    client.ask([b"a", b"b"], "q", detail="low", reduced_jpeg=False).result()
    client.ask(b"a", "q").result()
    mixed = Turn(role="user", parts=(ImageFile(data=b"a", detail="low"), b"b", ImageFile(data=b"c"), "q"))
    client.chat([mixed, user("and?", images=b"d", detail="high"), user("q", images=b"e", detail="auto")]).result()
    both, bare, each = gateway.requests
    asked = image_pb2.ImageOptions(detail=image_pb2.IMAGE_DETAIL_LOW, reduced_jpeg=False)
    assert [part.image_options for part in both.turns[0].parts[:2]] == [asked, asked]
    assert not bare.turns[0].parts[0].HasField("image_options")
    parts = [part for turn in each.turns for part in turn.parts if part.WhichOneof("part") == "image"]
    assert [part.image for part in parts] == [b"a", b"b", b"c", b"d", b"e"]
    details = [part.image_options.detail for part in parts]
    assert details == [image_pb2.IMAGE_DETAIL_LOW, 0, 0, image_pb2.IMAGE_DETAIL_HIGH, 0]
    assert not any(part.image_options.HasField("reduced_jpeg") for part in parts)
    with pytest.raises(FocusClientError, match=r"parts\[0\]\.detail: is 'most', expected low, high or auto"):
        client.ask(b"a", "q", detail="most")
    with pytest.raises(FocusClientError, match="reduced_jpeg: is 'yes', expected True or False"):
        client.ask(b"a", "q", reduced_jpeg="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "F", "I", "I;16"])
def test_a_pillow_image_keeps_its_orientation_and_its_pixels_in_every_mode(mode: str) -> None:
    picture = Image.linear_gradient("L").resize((8, 4))
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        picture = ImageCms.applyTransform(picture.convert("RGB"), ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    else:
        picture = picture.convert(mode)
    picture.getexif()[0x0112] = 6
    sent, shown = (ImageOps.exif_transpose(i) for i in (Image.open(io.BytesIO(read_image(picture))), picture))
    assert sent.size == shown.size == (4, 8)
    if mode not in ("F", "I"):  # these two with their values: Pillow's RGB of them is clipped
        sent, shown = sent.convert("RGB"), shown.convert("RGB")
    assert sent.tobytes() == shown.tobytes()


def test_messages_larger_than_grpc_s_default_limit_pass(client: FocusClient, gateway: ScriptedGateway) -> None:
    client.ask(b"\0" * (9 * 2**20), "q").result()
    assert len(gateway.requests[0].turns[0].parts[0].image) == 9 * 2**20
    gateway.script = lambda request, context: iter([started(), token("y" * (5 * 2**20)), finished()])
    assert len(client.ask(None, "q").result().text) == 5 * 2**20


def test_metadata_names_application_token_and_deadline(gateway: ScriptedGateway) -> None:
    with FocusClient(gateway.address, token="secret", application="other", timeout_s=9) as client:
        client.ask(None, "q").result()
    with FocusClient(gateway.address) as client:
        client.ask(None, "q").result()
    first, second = gateway.metadata
    assert first["application"] == "other" and first["authorization"] == "Bearer secret"
    assert 8000 < int(first["focusllava-timeout-ms"]) <= 9000
    assert second["application"] == "gateway"
    assert "authorization" not in second and "focusllava-timeout-ms" not in second


def test_unavailable_is_tried_again_before_the_first_event(client: FocusClient, gateway: ScriptedGateway) -> None:
    gateway.script = gateway.refusing(grpc.StatusCode.UNAVAILABLE, "restarting", times=2)
    assert client.ask(None, "q").result().text == "a red café"
    assert len(gateway.requests) == 3


def test_retries_end(client: FocusClient, gateway: ScriptedGateway) -> None:
    gateway.script = gateway.refusing(grpc.StatusCode.UNAVAILABLE, "restarting")
    with pytest.raises(FocusClientError) as caught:
        client.ask(None, "q").result()
    assert (caught.value.code, caught.value.message) == ("UNAVAILABLE", "restarting")  # a server did answer
    assert len(gateway.requests) == QUICK.attempts


def test_a_server_that_went_is_waited_for_and_one_that_never_was_is_not_for_long(gateway: ScriptedGateway) -> None:
    """The default policy has its times cut to a tenth: a proxy that is killed is back after 5 to 30 s."""
    default = RetryPolicy()
    assert default.attempts is None and default.patience_s >= 45 and default.patience_to_connect_s >= 10
    waited: list[FocusClientError] = []
    retry = RetryPolicy(first_delay_s=0.02, max_delay_s=0.2, patience_to_connect_s=0.5, on_wait=waited.append)
    with FocusClient(gateway.address, retry=retry) as client:
        assert client.ask(None, "q").result().text == "a red café"
        gateway.stop()
        threading.Timer(2.0, gateway.start_again).start()
        began = time.monotonic()
        assert client.ask(None, "q").result().text == "a red café"
        assert 1 < time.monotonic() - began < 10 and waited and waited[0].code == "UNAVAILABLE"
    with FocusClient("127.0.0.1:9", retry=retry) as client:
        began = time.monotonic()
        with pytest.raises(FocusClientError, match="no server answers at"):
            client.model_info()
        assert 0.2 < time.monotonic() - began < 5


def test_nothing_is_tried_again_after_the_first_event(client: FocusClient, gateway: ScriptedGateway) -> None:
    def script(request, context):
        yield started()
        yield token("half")
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    gateway.script = script
    stream = client.ask(None, "q")
    with pytest.raises(FocusClientError) as caught:
        list(stream)
    assert caught.value.code == "UNAVAILABLE" and stream.text == "half" and len(gateway.requests) == 1


@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "INTERNAL"])
def test_other_statuses_are_not_tried_again(client: FocusClient, gateway: ScriptedGateway, code: str) -> None:
    gateway.script = gateway.refusing(grpc.StatusCode[code], "threshold: is 3, expected (0, 1]")
    with pytest.raises(FocusClientError) as caught:
        client.ask(None, "q").result()
    assert (caught.value.code, caught.value.message) == (code, "threshold: is 3, expected (0, 1]")
    assert len(gateway.requests) == 1


def test_error_event_in_the_stream(client: FocusClient, gateway: ScriptedGateway) -> None:
    gateway.script = lambda request, context: iter([started(), token("a"), failed("RESOURCE_EXHAUSTED", "full")])
    stream = client.ask(None, "q")
    with pytest.raises(FocusClientError) as caught:
        stream.result()
    assert (caught.value.code, caught.value.message, stream.text) == ("RESOURCE_EXHAUSTED", "full", "a")


@pytest.mark.parametrize("events", [[], [started()], [started(), token("a")]], ids=["empty", "started", "token"])
def test_a_stream_that_breaks_off_is_an_error(client: FocusClient, gateway: ScriptedGateway, events) -> None:
    gateway.script = lambda request, context: iter(events)
    with pytest.raises(FocusClientError, match="broke off"):
        list(client.ask(None, "q"))


def test_deadline_covers_the_whole_answer(gateway: ScriptedGateway) -> None:
    gateway.script = gateway.endless
    with FocusClient(gateway.address, timeout_s=60) as client:
        began = time.monotonic()
        with pytest.raises(FocusClientError) as caught:
            client.ask(None, "q", timeout_s=0.3).result()
    assert caught.value.code == "DEADLINE_EXCEEDED" and time.monotonic() - began < 5
    assert gateway.cancelled.wait(5)


def test_deadline_counts_from_the_call(gateway: ScriptedGateway) -> None:
    with FocusClient(gateway.address, timeout_s=0.3) as client:
        stream = client.ask(None, "q")
        time.sleep(0.4)
        assert stream.result().text == "a red café"


@pytest.mark.parametrize(("details", "said"), [("a limit of the server", "a limit of the server"), ("", "no details")])
def test_a_deadline_of_the_server_is_told_in_its_words(
    client: FocusClient, gateway: ScriptedGateway, details: str, said: str
) -> None:
    gateway.script = gateway.refusing(grpc.StatusCode.DEADLINE_EXCEEDED, details)
    with pytest.raises(FocusClientError, match=said):
        client.ask(None, "q").result()


def test_deadline_bounds_the_retries(gateway: ScriptedGateway) -> None:
    gateway.script = gateway.refusing(grpc.StatusCode.UNAVAILABLE, "restarting")
    retry = RetryPolicy(attempts=1000, first_delay_s=0.05, max_delay_s=0.05)
    with FocusClient(gateway.address, timeout_s=0.4, retry=retry) as client:
        began = time.monotonic()
        with pytest.raises(FocusClientError):
            client.ask(None, "q").result()
    assert time.monotonic() - began < 5 and 1 < len(gateway.requests) < 100


def test_leaving_the_block_cancels_on_the_server(client: FocusClient, gateway: ScriptedGateway) -> None:
    gateway.script = gateway.endless
    with client.ask(None, "q") as stream:
        assert next(stream) == "x"
    assert gateway.cancelled.wait(5)
    assert list(stream) == [] and stream.usage is None


def test_close_from_another_thread_ends_a_waiting_iteration(client: FocusClient, gateway: ScriptedGateway) -> None:
    release = threading.Event()

    def script(request, context):
        yield started()
        release.wait(20)

    gateway.script = script
    stream = client.ask(None, "q")
    threading.Timer(0.2, stream.close).start()
    began = time.monotonic()
    assert list(stream) == []
    assert time.monotonic() - began < 5
    release.set()


def test_nobody_there(tmp_path) -> None:
    for address in ("127.0.0.1:9", "unix:/nowhere", "nowhere.invalid:9"):
        with FocusClient(address, retry=RetryPolicy(attempts=1)) as client:
            with pytest.raises(FocusClientError, match=f"no server answers at {address} ") as caught:
                client.ask(None, "q").result()
        assert caught.value.code == "UNAVAILABLE"
    with FocusClient("127.0.0.1:9") as client:
        with pytest.raises(FocusClientError) as caught:
            client.ask(tmp_path / "missing.png", "q")
        assert caught.value.code == "INVALID_ARGUMENT" and "missing.png" in caught.value.message


def test_closing_the_client_ends_its_streams(gateway: ScriptedGateway) -> None:
    gateway.script = gateway.endless
    client = FocusClient(gateway.address)
    running, waiting = client.ask(None, "q"), client.ask(None, "q")
    assert next(running) == "x"
    client.close()
    for use, code in ((running.result, "CANCELLED"), (waiting.result, "FAILED_PRECONDITION"),
                      (client.model_info, "FAILED_PRECONDITION")):  # fmt: skip
        with pytest.raises(FocusClientError) as caught:
            use()
        assert caught.value.code == code
    assert gateway.cancelled.wait(5)


def test_what_the_wire_cannot_carry_is_refused(client: FocusClient, gateway: ScriptedGateway) -> None:
    with pytest.raises(TypeError, match="treshold"):
        client.ask(None, "q", treshold=0.5)  # type: ignore[call-arg]
    assert gateway.requests == []


def test_model_info(client: FocusClient) -> None:
    info = client.model_info()
    assert (info.name, info.num_layers, info.max_images) == ("focusllava-tiny", 6, 4)


async def test_async_streams_concurrently(gateway: ScriptedGateway) -> None:
    async with AsyncFocusClient(gateway.address, timeout_s=20) as client:
        answers = await asyncio.gather(*(client.ask(b"i", f"q{n}").result() for n in range(6)))
        pieces = [text async for text in client.ask(None, "q")]
        assert (await client.model_info()).name == "focusllava-tiny"
    assert {answer.text for answer in answers} == {"a red café"} and pieces == ["a ", "red ", "café"]
    assert len(gateway.requests) == 7


async def test_async_retry_deadline_and_error(gateway: ScriptedGateway) -> None:
    async with AsyncFocusClient(gateway.address, timeout_s=20, retry=QUICK) as client:
        gateway.script = gateway.refusing(grpc.StatusCode.UNAVAILABLE, "restarting", times=2)
        assert (await client.ask(None, "q").result()).text == "a red café"
        gateway.script = gateway.refusing(grpc.StatusCode.UNAVAILABLE, "restarting")
        with pytest.raises(FocusClientError, match="UNAVAILABLE"):
            await client.ask(None, "q").result()
        gateway.script = gateway.endless
        with pytest.raises(FocusClientError, match="DEADLINE_EXCEEDED"):
            await client.ask(None, "q", timeout_s=0.2).result()
        gateway.script = lambda request, context: iter([started(), failed("INVALID_ARGUMENT", "bad")])
        with pytest.raises(FocusClientError, match="INVALID_ARGUMENT: bad"):
            await client.ask(None, "q").result()


async def test_async_close_and_task_cancellation_reach_the_server(gateway: ScriptedGateway) -> None:
    gateway.script = gateway.endless
    async with AsyncFocusClient(gateway.address) as client:
        async with client.ask(None, "q") as stream:
            assert await anext(stream) == "x"
        assert await asyncio.to_thread(gateway.cancelled.wait, 5)
        assert [text async for text in stream] == []

        gateway.cancelled.clear()
        stream = client.ask(None, "q")
        reading = asyncio.create_task(stream.result())
        while not stream.text:
            await asyncio.sleep(0.01)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert await asyncio.to_thread(gateway.cancelled.wait, 5)


async def test_async_close_ends_a_waiting_iteration(gateway: ScriptedGateway) -> None:
    gateway.script = gateway.endless
    async with AsyncFocusClient(gateway.address) as client:
        stream = client.ask(None, "q")
        await anext(stream)
        reading = asyncio.create_task(stream.result())
        await asyncio.sleep(0.05)
        stream.close()
        with pytest.raises(FocusClientError, match="broke off"):  # result() has no whole answer to give
            await asyncio.wait_for(reading, 5)


async def test_async_closing_the_client_ends_its_streams(gateway: ScriptedGateway) -> None:
    gateway.script = gateway.endless
    client = AsyncFocusClient(gateway.address)
    running, waiting = client.ask(None, "q"), client.ask(None, "q")
    await anext(running)
    reading = asyncio.create_task(running.result())
    await asyncio.sleep(0.05)
    await client.close()
    for use, code in ((reading, "CANCELLED"), (waiting.result(), "FAILED_PRECONDITION"),
                      (client.model_info(), "FAILED_PRECONDITION")):  # fmt: skip
        with pytest.raises(FocusClientError) as caught:
            await asyncio.wait_for(use, 5)
        assert caught.value.code == code


async def test_async_closing_the_client_ends_a_waiting_model_info() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        client = AsyncFocusClient(f"127.0.0.1:{mute.getsockname()[1]}")
        waiting = asyncio.create_task(client.model_info())
        await asyncio.sleep(0.1)
        await client.close()
        with pytest.raises(FocusClientError, match="CANCELLED"):
            await asyncio.wait_for(waiting, 5)


async def test_async_a_cancelled_task_stays_cancelled_where_the_client_is_closed(gateway: ScriptedGateway) -> None:
    gateway.script = gateway.endless
    client = AsyncFocusClient(gateway.address)
    stream = client.ask(None, "q")
    await anext(stream)
    reading = asyncio.create_task(stream.result())
    await asyncio.sleep(0.05)
    reading.cancel()
    await client.close()
    with pytest.raises(asyncio.CancelledError):
        await reading
