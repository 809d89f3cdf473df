"""Keys, names, ids and a storm through Ray's own proxies: a cluster of its own, with keys and few places."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal

import grpc
import httpx2
import openai
import pytest
from click.testing import CliRunner

from cluster.key_command import key as key_command
from cluster.local import LocalCluster
from focusllava import FocusClient, FocusClientError
from focusllava.v1 import focus_pb2_grpc
from tests.serving_client import FP32, LEAKS, picture, question, replica_pids, until

FEW = {"min_replicas": 1, "max_replicas": 1}
OPTIONS = {
    "gateway": {"max_ongoing_requests": 3, "max_queued_requests": 2, "autoscaling_config": FEW},
    "encoder": {"autoscaling_config": FEW},
    "llm": {"autoscaling_config": FEW},
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"

    def new(name: str, *limits: str) -> str:
        done = CliRunner().invoke(key_command, ["new", name, "--file", str(file), *limits])
        assert done.exit_code == 0, done.output
        return done.stdout.strip()

    return file, new


@pytest.fixture(scope="module")
def alice(keys) -> str:
    return keys[1]("alice")


@pytest.fixture(scope="module")
def cluster(keys, alice):
    places = {"grpc_port": 0, "timeout_s": 400, "args": FP32, "options": OPTIONS}
    with LocalCluster(api_keys=keys[0], env={"FOCUSLLAVA_LOG_FORMAT": "json"}, **places) as local:
        yield local.start(progress=lambda line: None)


@pytest.fixture(scope="module")
def http(cluster):
    with httpx2.Client(base_url=cluster.openai_url.removesuffix("/v1"), timeout=60, trust_env=False) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def body(**fields) -> dict:
    return {"model": "focusllava-tiny", "messages": [{"role": "user", "content": "what?"}], "max_tokens": 4, **fields}


def test_grpc_asks_for_a_key(cluster, alice):
    for wrong in (None, "fl-other"):
        with FocusClient(cluster.grpc_address, api_key=wrong, timeout_s=30) as client:
            for ask in (client.model_info, lambda: client.ask(picture(1), "what?").result()):
                with pytest.raises(FocusClientError, match="authorization: ") as caught:
                    ask()
                assert caught.value.code == "UNAUTHENTICATED" and not LEAKS.search(caught.value.message)
    with FocusClient(cluster.grpc_address, api_key=alice, timeout_s=60) as client:
        assert client.model_info().name == "focusllava-tiny"
        assert client.ask(picture(1), "what?", max_tokens=4).result().usage.completion_tokens > 0


def test_http_asks_for_a_key_and_tells_probes_without(cluster, http, alice):
    for headers in ({}, bearer("fl-other")):
        refused = http.post("/v1/chat/completions", json=body(), headers=headers)
        assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/v1/models", headers=headers).status_code == 401
    assert http.get("/health").status_code == http.get("/ready").status_code == 200
    model = http.get("/v1/models/focusllava-tiny", headers=bearer(alice)).json()
    assert model["max_model_len"] > 0 and model["focus"]["max_tokens"] == 1024
    with openai.OpenAI(base_url=cluster.openai_url, api_key=alice) as client:
        assert client.chat.completions.create(**body()).usage.completion_tokens > 0


def test_another_sites_name_is_refused_on_the_loopback_interface(http, alice):
    refused = http.get("/v1/models", headers={**bearer(alice), "host": "evil.example"})
    assert refused.status_code == 421 and refused.json()["error"]["param"] == "host"
    assert http.get("/v1/models", headers={**bearer(alice), "host": "localhost:1"}).status_code == 200


def test_a_key_is_taken_over_and_taken_away_while_it_serves(cluster, http, keys):
    file, new = keys
    before = file.read_text()
    bob = new("bob", "--requests-per-minute", "1")
    assert until(lambda: http.get("/v1/models", headers=bearer(bob)).status_code == 200)
    assert http.post("/v1/chat/completions", json=body(), headers=bearer(bob)).status_code == 200
    refused = http.post("/v1/chat/completions", json=body(), headers=bearer(bob))
    assert refused.status_code == 429 and 1 < int(refused.headers["retry-after"]) <= 60
    with FocusClient(cluster.grpc_address, api_key=bob) as client, pytest.raises(FocusClientError) as caught:
        client.ask([], "what?").result()
    assert caught.value.code == "RESOURCE_EXHAUSTED" and 1 < caught.value.retry_after_s <= 60
    file.write_text(before)
    assert until(lambda: http.get("/v1/models", headers=bearer(bob)).status_code == 401)


def test_the_id_of_a_request_comes_back_and_stands_in_the_log(cluster, http, alice):
    said = http.post("/v1/chat/completions", json=body(), headers={**bearer(alice), "x-request-id": "mine-7"})
    assert said.headers.get_list("x-request-id") == ["mine-7"] and said.json()["id"] == "chatcmpl-mine-7"
    metadata = (("application", "gateway"), ("x-request-id", "mine-8"), *bearer(alice).items())
    with grpc.insecure_channel(cluster.grpc_address) as channel:
        call = focus_pb2_grpc.FocusServiceStub(channel).Chat(question(picture(8)), timeout=60, metadata=metadata)
        assert [event.started.request_id for event in call if event.HasField("started")] == ["mine-8"]
        assert ("x-request-id", "mine-8") in [tuple(pair) for pair in call.trailing_metadata()]

    def logged(request_id: str) -> dict[str, dict]:
        """Lines of all three services about a request, by what they say."""
        lines = [
            json.loads(line)
            for log in cluster.state.ray_dir.glob("session_latest/logs/worker-*.err")
            for line in log.read_text(errors="replace").splitlines()
            if line.startswith('{"time"')
        ]
        return {line["message"]: line for line in lines if line.get("request_id") == request_id}

    def has_lines(request_id: str, *said: str) -> bool:
        return until(lambda: logged(request_id).keys() == set(said))

    assert has_lines("mine-7", "answer ended", "request ended"), logged("mine-7")
    assert has_lines("mine-8", "image encoded", "answer ended", "request ended"), logged("mine-8")
    found = logged("mine-8")
    assert {line["outcome"] for line in found.values()} == {"ok"} and found["request ended"]["key"] == "alice"
    assert found["request ended"]["completion_tokens"] == found["answer ended"]["completion_tokens"] > 0
    assert 0 < found["image encoded"]["visual_tokens"] <= found["image encoded"]["uncompressed"]


def test_what_rays_queue_refuses_is_429_at_both_doors(cluster, http, alice):
    long = {"max_tokens": 1000, "ignore_eos": True}

    def over_http(_: int) -> httpx2.Response:
        return http.post("/v1/chat/completions", json=body(**long), headers=bearer(alice))

    def over_grpc(_: int) -> str:
        with FocusClient(cluster.grpc_address, api_key=alice, timeout_s=120) as client:
            try:
                return client.ask([], "what?", **long).result().finish_reason
            except FocusClientError as error:
                assert error.code == "RESOURCE_EXHAUSTED" and not LEAKS.search(error.message), error
                assert error.retry_after_s == 1
                return error.message

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(over_http, range(16)))
        said = set(pool.map(over_grpc, range(16)))
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert answer.json()["error"]["message"] == "the server is full; try again later"
            assert answer.headers["retry-after"] == "1" and "x-request-id" in answer.headers
    assert said == {"length", "the gateway application is full (max_queued_requests); try again later"}
    assert http.post("/v1/chat/completions", json=body(), headers=bearer(alice)).status_code == 200


def test_a_stage_without_a_replica_is_not_ready(cluster, http):
    """Runs last: the language model is killed."""
    (replica,) = replica_pids(cluster, "llm")
    os.kill(replica, signal.SIGKILL)
    said: list[str] = []

    def refused() -> bool:
        answer = http.get("/ready")
        said.append(answer.text)
        return answer.status_code == 503

    assert until(refused, 60) and "the llm stage" in said[-1]
    assert until(lambda: not refused(), 120)
