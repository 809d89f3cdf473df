"""How a client's call ends that is refused, breaks off, takes too long or is closed: retry, deadline, cancel."""

from __future__ import annotations

import threading
import time

import grpc
import pytest

from focusllava import (
    FocusClient,
    FocusClientError,
    RetryPolicy,
)
from focusllava.errors import RETRY_METADATA
from tests.fakes.gateway import QUICK, ScriptedGateway, failed, started, token


def test_unavailable_is_tried_again_before_anything_came(client: FocusClient, gateway: ScriptedGateway) -> None:
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


def test_an_answer_that_began_without_text_is_asked_for_again_and_forgotten(
    client: FocusClient, gateway: ScriptedGateway
) -> None:
    def lost_at_once(request, context):
        yield started()
        yield token("")
        context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    scripts = [lost_at_once, gateway.script]
    gateway.script = lambda request, context: scripts.pop(0)(request, context)
    answer = client.ask(None, "q").result()
    assert answer.text == "a red café" and len(answer.token_ids) == 4 and len(gateway.requests) == 2


def test_nothing_is_tried_again_after_the_first_text(client: FocusClient, gateway: ScriptedGateway) -> None:
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


def test_a_full_server_says_when_to_come_back(client: FocusClient, gateway: ScriptedGateway) -> None:
    def script(request, context):
        context.set_trailing_metadata(((RETRY_METADATA, "1500"),))
        yield from gateway.refusing(grpc.StatusCode.RESOURCE_EXHAUSTED, "the server is full")(request, context)

    gateway.script = script
    with pytest.raises(FocusClientError) as caught:
        client.ask(None, "q").result()
    assert (caught.value.code, caught.value.retry_after_s, len(gateway.requests)) == ("RESOURCE_EXHAUSTED", 1.5, 1)
    gateway.script = gateway.refusing(grpc.StatusCode.RESOURCE_EXHAUSTED, "max_tokens: is too large")
    with pytest.raises(FocusClientError) as caught:
        client.ask(None, "q").result()
    assert caught.value.retry_after_s is None


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
