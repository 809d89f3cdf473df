"""The same cluster, deployed anew: autoscaling from one LLM replica to two, and visual tokens in Redis that outlive the
gateway. It comes last of this package's tests, for what it changes stays."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import threading
from typing import Any

import grpc
import pytest
import redis

from benchmarks.redis_server import RedisServer
from cluster.local import SERVE_CONFIG, serve_config
from cluster.serve_api import application_states, request_json
from cluster.watch import check_listeners
from focusllava.v1 import llm_pb2
from tests.serving_client import FP32, chat, ids_of, picture, question, replica_pids, until


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture(scope="module", autouse=True)
def deployed_again(cluster, redis_server):
    """Does what `serve deploy` of a file does, and of the file changed: the gateway is replaced, the stages go on."""
    assert until(lambda: llm_replicas(cluster) == 1)
    deploy(cluster, serve_config(SERVE_CONFIG, cluster.state.ports, cluster.state.checkpoint, FP32))
    kept = set(replica_pids(cluster, "encoder"))
    deploy(cluster, configuration(cluster, redis_server))
    assert kept & set(replica_pids(cluster, "encoder"))


def configuration(cluster, redis_server) -> dict[str, Any]:
    """A gateway with Redis, and a language model that takes one request as a reason for another replica."""
    config = serve_config(SERVE_CONFIG, cluster.state.ports, cluster.state.checkpoint, FP32)
    gateway, _, llm = (application["deployments"][0] for application in config["applications"])
    gateway["ray_actor_options"]["runtime_env"] = {"env_vars": {"REDIS_URL": redis_server.url}}
    llm["autoscaling_config"]["policy"]["policy_kwargs"]["answers"] = 1
    llm["autoscaling_config"] |= {"upscale_delay_s": 1, "downscale_delay_s": 600}
    return config


def deploy(cluster, config) -> None:
    """Returns when all three applications run and the gateway is another one."""
    replaced = set(replica_pids(cluster, "gateway"))
    request_json(cluster.state, "/api/serve/applications/", config, timeout_s=60)

    def deployed() -> bool:
        running = all(status == "RUNNING" for status, _ in application_states(cluster.state).values())
        gateways = set(replica_pids(cluster, "gateway"))
        return running and len(gateways) == 1 and not gateways & replaced

    assert until(deployed, 200)


def llm_replicas(cluster, *states: str) -> int:
    """Replicas in one of these states, as `serve status` names them; without one, the running ones."""
    details = request_json(cluster.state, "/api/serve/applications/")
    replicas = details["applications"]["llm"]["deployments"]["LanguageModel"]["replicas"]
    return sum(replica["state"] in (states or ("RUNNING",)) for replica in replicas)


def test_load_brings_a_second_llm_replica_and_both_answer(cluster, channel):
    assert llm_replicas(cluster) == 1
    request = question(picture(1), sampling=llm_pb2.SamplingParams(max_tokens=300, ignore_eos=True))
    alone = ids_of(chat(channel, request))
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = []

        def begun() -> bool:
            answers.extend(pool.map(lambda _: ids_of(chat(channel, request)), range(6)))
            return llm_replicas(cluster, "STARTING", "RUNNING") == 2

        assert until(begun, 120), "the autoscaler did not start a second replica"
        # It starts faster without the load, and stays: downscale_delay_s.
        assert until(lambda: llm_replicas(cluster) == 2, 180), "the second replica did not come up"
        answers.extend(pool.map(lambda _: ids_of(chat(channel, request)), range(12)))
    assert all(answer == alone for answer in answers)
    assert len(replica_pids(cluster, "llm")) == 2
    check_listeners(cluster.state)  # the new one's ports are closed too


def test_replicas_that_are_replaced_finish_their_answers_and_the_new_ones_are_found(cluster, channel, redis_server):
    """A rolling deployment of both stages under load: every answer comes whole."""
    request = question(picture(1), sampling=llm_pb2.SamplingParams(max_tokens=200, ignore_eos=True))
    alone = ids_of(chat(channel, request))
    old = set(replica_pids(cluster, "llm")) | set(replica_pids(cluster, "encoder"))
    config = configuration(cluster, redis_server)
    for application in config["applications"][1:]:
        application["deployments"][0]["ray_actor_options"]["runtime_env"] = {"env_vars": {"FOCUSLLAVA_TEST": "new"}}
    request_json(cluster.state, "/api/serve/applications/", config, timeout_s=60)

    def replaced() -> bool:
        return not old & {*replica_pids(cluster, "llm"), *replica_pids(cluster, "encoder")}

    done = threading.Event()

    def keep_asking(seed: int) -> int:
        answers = 0
        while not done.is_set():
            assert ids_of(chat(channel, request)) == alone
            assert chat(channel, question(picture(1000 * seed + answers)))[-1].HasField("finished")
            answers += 1
        return answers

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(keep_asking, seed) for seed in range(1, 4)]
        try:
            assert until(lambda: replaced() or any(each.done() for each in asking), 240)
        finally:
            done.set()
        assert all(each.result() for each in asking)
    assert replaced()


def test_a_new_gateway_finds_the_visual_tokens_in_redis(cluster, channel, redis_server):
    image = picture(2)
    assert not chat(channel, question(image))[0].started.images[0].cached
    with redis.Redis.from_url(redis_server.url) as store:
        assert any(image_key.startswith(b"focusllava:visual-tokens:") for image_key in store.keys())
    (gateway,) = replica_pids(cluster, "gateway")
    os.kill(gateway, signal.SIGKILL)

    def cached() -> bool:
        with contextlib.suppress(grpc.RpcError):  # until Serve has started another
            return chat(channel, question(image))[0].started.images[0].cached
        return False

    assert until(cached, 120)
    assert gateway not in replica_pids(cluster, "gateway")


def test_a_dead_redis_is_a_miss_and_never_an_error(channel, redis_server):
    redis_server.kill()
    image = picture(3)
    first, again = chat(channel, question(image)), chat(channel, question(image))
    assert not first[0].started.images[0].cached and not again[0].started.images[0].cached
    assert ids_of(first) == ids_of(again)
