"""The public API of a real Ray with the three Serve applications, asked over a real socket."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import pathlib
import re
import signal
import time

import grpc
import pytest

from focusllava import FocusClient, LocalModel
from focusllava.v1 import focus_pb2, focus_pb2_grpc, llm_pb2
from services.checkpoint.config import FocusLlavaConfig
from services.common.media import content_hash
from tests.serving_client import LEAKS, chat, gauge, ids_of, picture, question, replica_pids, scrape, text_of, until

DASHBOARD = pathlib.Path(__file__).parents[3] / "cluster" / "grafana" / "focusllava.json"


def test_an_answer_streams_and_accounts(channel, checkpoint):
    image = picture(1)
    events = chat(channel, question(image))
    first, *tokens, last = (event.WhichOneof("event") for event in events)
    assert (first, set(tokens), last) == ("started", {"token"}, "finished")
    info, usage = events[0].started.images[0], events[-1].finished.usage
    assert info.content_hash == content_hash(image) and not info.cached
    assert usage.completion_tokens == len(ids_of(events)) == 12
    assert usage.visual_tokens_uncompressed == info.visual_tokens_uncompressed
    assert usage.visual_tokens_kept < usage.visual_tokens_sampled == info.visual_tokens_sampled
    assert info.visual_tokens_sampled < info.visual_tokens_uncompressed
    assert 0 < usage.converted_share_percent < 100 and usage.kv_bytes < usage.kv_unpruned_bytes
    assert usage.time_to_first_token_ms > 0 and events[-1].finished.reason == llm_pb2.FINISH_REASON_LENGTH


def test_the_second_question_about_an_image_is_answered_from_the_cache(channel):
    image = picture(2)
    first, again = chat(channel, question(image)), chat(channel, question(image))
    other = chat(channel, question(image, "How many circles are there?"))
    unsampled = chat(channel, question(image, vision_sampler_off=True))
    cached = [events[0].started.images[0].cached for events in (first, again, other, unsampled)]
    assert cached == [False, True, True, False]
    assert ids_of(again) == ids_of(first)


def test_a_focus_map_is_what_the_stages_chose(cluster, channel, checkpoint):
    image, asked = picture(4), "How many squares are there?"
    with LocalModel(checkpoint[0], "cpu", "float32") as model:
        own = model.ask(image, asked, max_tokens=3, return_map=True).focus
    with FocusClient(cluster.grpc_address, timeout_s=60) as client:
        first, again = (client.ask(image, asked, max_tokens=3, return_map=True).result().focus for _ in range(2))
        assert client.ask(image, asked, max_tokens=3).result().focus is None
    for served in (first, again):  # from the encoder, and from the cache and the shelf
        (found,), (expected,) = served.maps, own.maps
        assert (served.prune_layer, served.threshold) == (own.prune_layer, own.threshold)
        assert (found.boxes, found.kept, found.regions) == (expected.boxes, expected.kept, expected.regions)
        # The encoder sends bfloat16, where the process has float32.
        assert found.importance == pytest.approx(expected.importance, rel=0.02, abs=1e-4)


def test_low_detail_is_one_tile_in_the_accounts_and_in_the_cache(cluster, checkpoint):
    patches = FocusLlavaConfig.load(checkpoint[0]).patches_per_side ** 2
    image = picture(3)
    with FocusClient(cluster.grpc_address, timeout_s=60) as client:
        high = client.ask(image, "What?", max_tokens=2).result()
        low, again = (client.ask(image, "What?", detail="low", max_tokens=2).result() for _ in range(2))
        auto = client.ask(image, "What?", detail="auto", max_tokens=2).result()
        whole = client.ask(image, "What?", reduced_jpeg=False, max_tokens=2).result()
    assert low.usage.visual_tokens_uncompressed == low.usage.visual_tokens_sampled == patches + 1
    saved = high.usage.visual_tokens_sampled - (patches + 1)
    assert saved > 0 and low.usage.prompt_tokens == high.usage.prompt_tokens - saved
    assert [answer.images[0].cached for answer in (high, low, again, auto, whole)] == [False, False, True, True, False]
    assert again.text == low.text and auto.text == high.text == whole.text


def test_two_clients_stream_at_the_same_time(cluster):
    """Their first tokens come before either's last: neither waits for the other to end."""

    async def stream(seed: int) -> tuple[float, float, int]:
        async with grpc.aio.insecure_channel(cluster.grpc_address) as channel:
            stub = focus_pb2_grpc.FocusServiceStub(channel)
            sampling = llm_pb2.SamplingParams(max_tokens=400, ignore_eos=True)
            first = 0.0
            count = 0
            call = stub.Chat(
                question(picture(seed), sampling=sampling), timeout=120, metadata=(("application", "gateway"),)
            )
            async for event in call:
                if event.WhichOneof("event") == "token":
                    first = first or time.monotonic()
                    count += len(event.token.token_ids)
            return first, time.monotonic(), count

    async def both():
        return await asyncio.gather(stream(21), stream(22))

    (first_a, last_a, count_a), (first_b, last_b, count_b) = asyncio.run(both())
    assert (count_a, count_b) == (400, 400)
    assert first_a < last_b and first_b < last_a


def test_a_cancelled_call_frees_its_kv_cache(cluster, channel):
    stub = focus_pb2_grpc.FocusServiceStub(channel)
    sampling = llm_pb2.SamplingParams(max_tokens=1000, ignore_eos=True)
    outcomes = r"^ray_focusllava_generate_requests_total\{[^\n]*outcome=\"cancelled\"[^\n]*\} (\S+)$"

    def cancelled() -> float:
        return sum(map(float, re.findall(outcomes, scrape(cluster), re.M)))

    before = cancelled()
    # As the first token comes, a message is being written in every process on the way: nobody waits for the next one.
    for _ in range(20):
        call = stub.Chat(question(picture(31), sampling=sampling), metadata=(("application", "gateway"),))
        while next(call).WhichOneof("event") != "token":
            pass
        assert not call.done()
        call.cancel()
    # An answer is half a second's work: on a busy machine a few may end before their cancellation.
    assert until(lambda: cancelled() >= before + 16), (
        f"of 20 calls {cancelled() - before} were cancelled at the llm stage"
    )
    assert until(lambda: gauge(cluster, "focusllava_kv_pages_used") == 0), "KV pages of a cancelled call stay taken"
    assert gauge(cluster, "focusllava_running_requests") == 0
    assert gauge(cluster, "focusllava_kv_pages_total") > 0


@pytest.mark.parametrize(
    "request_, code, says",
    [
        (question(text=""), "INVALID_ARGUMENT", "the question is empty"),
        (question(text="x" * 9000), "RESOURCE_EXHAUSTED", "9000 characters"),
        (question(text="@" * 8000), "INVALID_ARGUMENT", "context"),
        (question(b"", "x"), "INVALID_ARGUMENT", "0 bytes"),
        (question(b"GIF89a", "x"), "INVALID_ARGUMENT", "not a readable image"),
        (question(picture(41)[:2000], "x"), "INVALID_ARGUMENT", "turns[0].parts[0].image: is a truncated or damaged"),
        (question(prune=llm_pb2.PruneParams(threshold=0)), "INVALID_ARGUMENT", "prune.threshold"),
        (question(prune=llm_pb2.PruneParams(threshold=1.5)), "INVALID_ARGUMENT", "prune.threshold: is 1.5"),
        (question(sampling=llm_pb2.SamplingParams(max_tokens=10**9)), "RESOURCE_EXHAUSTED", "sampling.max_tokens"),
        (focus_pb2.ChatRequest(), "INVALID_ARGUMENT", "turns: is empty"),
    ],
)
def test_a_bad_request_gets_a_status_and_the_server_lives_on(channel, request_, code, says):
    with pytest.raises(grpc.RpcError) as caught:
        chat(channel, request_)
    details = caught.value.details()
    assert (caught.value.code().name, says in details) == (code, True), details
    assert not LEAKS.search(details), details
    assert chat(channel, question())[-1].WhichOneof("event") == "finished"


def test_many_clients_at_once_get_what_they_get_alone(cluster, channel):
    requests = [question(picture(60 + n), prune=llm_pb2.PruneParams(off=n % 2 == 0)) for n in range(6)]
    alone = [ids_of(chat(channel, request)) for request in requests]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda request: ids_of(chat(channel, request)), requests))
    assert together == alone


def test_model_info(channel, checkpoint):
    stub = focus_pb2_grpc.FocusServiceStub(channel)
    info = stub.GetModelInfo(focus_pb2.GetModelInfoRequest(), timeout=30, metadata=(("application", "gateway"),))
    assert (info.name, info.model_fingerprint) == (checkpoint[0].name, checkpoint[1])
    assert (info.num_layers, info.prune_layer, info.text_family) == (6, 2, "llama")
    assert info.max_images == 8 and info.max_image_bytes == 20 * 2**20


def test_answers_survive_the_death_of_their_llm_replica(cluster, channel):
    """A greedy answer, and one that is drawn and must match a schema: both go on and are the same."""
    digits = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 200}
    schema = json.dumps({**digits, "maxItems": 200})
    constrained = llm_pb2.SamplingParams(
        max_tokens=900, temperature=1, seed=11, constraint=llm_pb2.Constraint(json_schema=schema)
    )
    requests = [
        question(picture(81), sampling=llm_pb2.SamplingParams(max_tokens=600, ignore_eos=True)),
        question(picture(82), sampling=constrained),
    ]
    undisturbed = [ids_of(chat(channel, request)) for request in requests]
    stub = focus_pb2_grpc.FocusServiceStub(channel)
    calls = [stub.Chat(request, timeout=150, metadata=(("application", "gateway"),)) for request in requests]
    answers = [[next(call) for _ in range(4)] for call in calls]
    (replica,) = replica_pids(cluster, "llm")
    os.kill(replica, signal.SIGKILL)
    for events, call in zip(answers, calls, strict=True):
        events += list(call)
        assert events[-1].WhichOneof("event") == "finished", events[-1]
    assert [ids_of(events) for events in answers] == undisturbed and len(undisturbed[0]) == 600
    drawn = json.loads(text_of(answers[1]))
    assert len(drawn) == 200 and set(drawn) <= set(range(10)) and len(set(drawn)) > 1
    assert until(lambda: "focusllava_stage_retries_total{" in scrape(cluster)), "it was lost, and called again"


NOT_HERE = {
    "ray_focusllava_owned_calls_total",
    "ray_focusllava_training",
    "ray_focusllava_requests_compressed_total",
    "ray_focusllava_visual_token_bytes_sent_total",
    "ray_focusllava_visual_token_bytes_taken_total",
}
"""Metrics that nothing records here: one replica owns everything, nothing trains, no load compresses, and visual tokens
stay on the node's shelf."""


def test_the_endpoint_has_every_metric_that_the_dashboard_draws(cluster, channel):
    """Runs last, when everything has been recorded."""
    chat(channel, question(picture(71)))
    panels = json.loads(DASHBOARD.read_text())["panels"]
    text = " ".join(target["expr"] for panel in panels for target in panel.get("targets", ()))
    drawn = set(re.findall(r"ray_[a-z_]+", text)) - NOT_HERE

    def missing() -> set[str]:
        shown = set(re.findall(r"^(ray_[a-z_]+)[{ ]", scrape(cluster), re.M))
        return drawn - shown

    # A busy machine's controller is slow to report, and a scrape between two reports of a gauge may lack it: one scrape
    # that has all is enough.
    assert until(lambda: not missing(), 180), missing()
