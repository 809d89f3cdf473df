"""The same cluster, with targets and delays that a test can wait for: replicas come and go by the work of their stage.

It comes after the other tests of this package, for what it changes stays.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator

import pytest

from cluster.local import SERVE_CONFIG, serve_config
from cluster.serve_api import application_states, request_json
from focusllava.v1 import llm_pb2
from tests.serving_client import FP32, chat, picture, question, until

QUICK = {"upscale_delay_s": 1, "downscale_delay_s": 4, "look_back_period_s": 3, "metrics_interval_s": 1}
"""How fast a stage follows its work, in seconds."""
DEPLOYMENTS = {"encoder": "Encoder", "llm": "LanguageModel"}
FRESH = itertools.count()


@pytest.fixture(scope="module", autouse=True)
def quick(cluster) -> Iterator[None]:
    """Targets of a few tiles and answers; no encoder where no image comes."""
    config = serve_config(SERVE_CONFIG, cluster.state.ports, cluster.state.checkpoint, FP32)
    for application, kwargs in (("encoder", {"tiles": 2}), ("llm", {"answers": 3})):
        (deployment,) = next(a for a in config["applications"] if a["name"] == application)["deployments"]
        scaling = deployment["autoscaling_config"]
        scaling["policy"]["policy_kwargs"] |= kwargs
        scaling |= QUICK | {"min_replicas": 0 if application == "encoder" else 1}
    request_json(cluster.state, "/api/serve/applications/", config, timeout_s=60)
    assert until(lambda: set(states(cluster)) == {"RUNNING"}, 120)
    yield


def states(cluster) -> list[str]:
    return [status for status, _ in application_states(cluster.state).values()]


def replicas(cluster) -> dict[str, int]:
    """Running replicas of both stages."""
    applications = request_json(cluster.state, "/api/serve/applications/")["applications"]
    return {
        name: sum(each["state"] == "RUNNING" for each in applications[name]["deployments"][deployment]["replicas"])
        for name, deployment in DEPLOYMENTS.items()
    }


def grown(cluster, ask: Callable[[], object], clients: int, application: str) -> list[dict[str, int]]:
    """Replicas over time, while so many clients ask without pause until the application has two."""
    done, seen = threading.Event(), []

    def keep_asking() -> None:
        while not done.is_set():
            ask()

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(keep_asking) for _ in range(clients)]
        try:

            def two() -> bool:
                seen.append(replicas(cluster))
                return seen[-1][application] == 2 or any(each.done() for each in asking)

            assert until(two, 120), seen
        finally:
            done.set()
        for each in asking:
            each.result()
    return seen


def health(cluster) -> dict:
    with urllib.request.urlopen(f"{cluster.openai_url.removesuffix('/v1')}/ready", timeout=30) as answer:
        return json.load(answer)


def test_without_images_the_encoder_sleeps_and_an_image_wakes_it(cluster, channel):
    assert until(lambda: replicas(cluster) == {"encoder": 0, "llm": 1}, 90), replicas(cluster)
    assert health(cluster)["status"] == "ok"
    assert chat(channel, question())[-1].HasField("finished"), "words need no encoder"
    time.sleep(3)
    assert health(cluster)["status"] == "ok"
    assert replicas(cluster)["encoder"] == 0, "neither asking for its health nor words wake it"
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        answers = pool.map(lambda seed: chat(channel, question(picture(seed))), (4001, 4002, 4001))
        assert all(answer[-1].HasField("finished") for answer in answers)


def test_many_images_bring_encoders_alone(cluster, channel):
    short, image = llm_pb2.SamplingParams(max_tokens=1), picture(4003, (900, 700))  # most of the work is to decode it

    def ask() -> None:
        # Readers ignore bytes after a picture's end: the same picture, under a hash that nobody has seen.
        fresh = image + next(FRESH).to_bytes(4, "big")
        assert chat(channel, question(fresh, sampling=short))[-1].HasField("finished")

    seen = grown(cluster, ask, 8, "encoder")
    assert {each["llm"] for each in seen} == {1}, seen
    assert until(lambda: replicas(cluster) == {"encoder": 0, "llm": 1}, 90), replicas(cluster)


def test_long_answers_bring_language_models_alone(cluster, channel):
    long = llm_pb2.SamplingParams(max_tokens=300, ignore_eos=True)

    def ask() -> None:
        assert chat(channel, question(sampling=long))[-1].HasField("finished")

    seen = grown(cluster, ask, 8, "llm")
    assert {each["encoder"] for each in seen} == {0}, seen
    assert until(lambda: replicas(cluster) == {"encoder": 0, "llm": 1}, 90), replicas(cluster)
