"""What callers see of killed processes, of methods that are not there, and of strangers who hold connections."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request

import grpc
import pytest

from focusllava import FocusClient
from focusllava.v1 import encoder_pb2, encoder_pb2_grpc, focus_pb2, focus_pb2_grpc, llm_pb2, llm_pb2_grpc
from tests.serving_client import LEAKS, chat, proxy_pids, question, replica_pids, until

LONG = llm_pb2.SamplingParams(max_tokens=900, ignore_eos=True)
GATEWAY = (("application", "gateway"),)
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""A proxy of the environment is not for the loopback interface."""


def works(channel) -> bool:
    with contextlib.suppress(grpc.RpcError):
        return chat(channel, question())[-1].WhichOneof("event") == "finished"
    return False


def completion(cluster) -> tuple[int, dict]:
    """A long answer over HTTP: its status and JSON."""
    model = json.load(OPENER.open(cluster.openai_url + "/models", timeout=60))["data"][0]["id"]
    body = {"model": model, "max_tokens": 900, "ignore_eos": True, "messages": [{"role": "user", "content": "what?"}]}
    request = urllib.request.Request(
        cluster.openai_url + "/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with OPENER.open(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize("application", ["gateway", "encoder", "llm"])
def test_a_method_of_another_application_is_unimplemented(channel, application):
    metadata = (("application", application),)
    calls = {
        "gateway": lambda: list(
            focus_pb2_grpc.FocusServiceStub(channel).Chat(focus_pb2.ChatRequest(), timeout=30, metadata=metadata)
        ),
        "encoder": lambda: encoder_pb2_grpc.EncoderServiceStub(channel).Encode(
            encoder_pb2.EncodeRequest(), timeout=30, metadata=metadata
        ),
        "llm": lambda: list(
            llm_pb2_grpc.LanguageModelServiceStub(channel).Generate(
                llm_pb2.GenerateRequest(), timeout=30, metadata=metadata
            )
        ),
    }
    for owner, call in calls.items():
        if owner == application:
            continue
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert application in caught.value.details() and not LEAKS.search(caught.value.details())


def test_a_killed_gateway_is_unavailable_without_internals_and_the_client_asks_again(cluster, channel):
    stub = focus_pb2_grpc.FocusServiceStub(channel)
    with FocusClient(cluster.grpc_address, timeout_s=120) as client, concurrent.futures.ThreadPoolExecutor(12) as pool:
        client.model_info()
        replicas = replica_pids(cluster, "gateway")
        calls = [stub.Chat(question(sampling=LONG), timeout=120, metadata=GATEWAY) for _ in range(12)]
        posts = [pool.submit(completion, cluster) for _ in range(4)]
        next(calls[0])
        for replica in replicas:
            os.kill(replica, signal.SIGKILL)
        # These find a gateway that is gone, or about to be.
        answers = [pool.submit(client.ask(None, "what?", max_tokens=5).result) for _ in range(8)]
        lost = 0
        for call in calls:
            try:
                list(call)
            except grpc.RpcError as error:
                lost += 1
                assert error.code() is grpc.StatusCode.UNAVAILABLE, error
                assert not LEAKS.search(error.details()), error.details()
        assert lost, "every answer ended before its gateway"
        assert all(answer.result().finish_reason for answer in answers)
        for status, body in (post.result() for post in posts):
            assert status == 200 or (status, body["error"]["type"]) == (503, "server_error"), body
    assert until(lambda: works(channel), 60)


def test_a_killed_proxy_is_waited_for(cluster, channel):
    with FocusClient(cluster.grpc_address, timeout_s=120) as client:
        client.model_info()
        (proxy,) = proxy_pids(cluster)
        os.kill(proxy, signal.SIGKILL)
        assert client.ask(None, "what?", max_tokens=5).result().finish_reason
    assert until(lambda: works(channel), 60)


def test_half_open_connections_stop_nobody_and_are_closed(cluster, channel):
    """Six hundred connect: one half sends no end of its headers, the other no end of its bodies."""
    url = cluster.openai_url + "/models"
    host, port = url.split("/")[2].split(":")
    headers = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with contextlib.ExitStack() as stack:
        sockets = []
        for number in range(600):
            stranger = stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            stranger.sendall(headers if number % 2 else headers + b"content-length: 1000\r\n\r\n{")
            sockets.append(stranger)
        began = time.monotonic()
        OPENER.open(url, timeout=20).read()
        assert works(channel)
        assert time.monotonic() - began < 20, "others wait for those who do not go on"
        for stranger in sockets:
            stranger.settimeout(max(45 - (time.monotonic() - began), 0.01))
            with contextlib.suppress(ConnectionError):
                while stranger.recv(4096):  # b"" where it is closed; TimeoutError fails the test
                    pass
    OPENER.open(url, timeout=20).read()
