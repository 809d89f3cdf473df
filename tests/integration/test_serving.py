"""A real Ray with the three Serve applications, asked over a real socket. One cluster serves every test here."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import signal
import time
import urllib.request

import grpc
import numpy as np
import pytest
import torch
from PIL import Image

from cluster.local import LocalCluster
from focusllava.v1 import encoder_pb2, encoder_pb2_grpc, focus_pb2, focus_pb2_grpc, llm_pb2, llm_pb2_grpc
from services.common import wire
from services.common.media import content_hash
from services.common.types import ChatTurn, GenerateRequest, ImagePart, SamplingParams, TextPart, TokenEvent
from services.encoder.pipeline import EncoderPipeline
from services.llm.engine import Engine
from tests.tiny_checkpoints import make_random_checkpoint

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
DASHBOARD = pathlib.Path(__file__).parents[2] / "cluster" / "grafana" / "focusllava.json"
LEAKS = re.compile(r"Traceback|File \"|\.py\b|/tmp/|/home/|site-packages|ray\.exceptions|\n")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[pathlib.Path, str]:
    folder = tmp_path_factory.mktemp("serving") / "random-tiny"
    return folder, make_random_checkpoint(folder)


@pytest.fixture(scope="module")
def cluster(checkpoint):
    said: list[str] = []
    with LocalCluster(checkpoint=checkpoint[0], grpc_port=0, timeout_s=400) as local:
        local.start(progress=said.append)
        assert any("gateway running" in line for line in said)
        yield local


@pytest.fixture(scope="module")
def channel(cluster):
    with grpc.insecure_channel(cluster.grpc_address, options=OPTIONS) as channel:
        yield channel


def picture(seed: int, size: tuple[int, int] = (120, 90)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def question(image: bytes | None = None, text: str = "What is on the card?", **fields) -> focus_pb2.ChatRequest:
    parts = [focus_pb2.ChatPart(image=image)] if image is not None else []
    fields.setdefault("sampling", llm_pb2.SamplingParams(max_tokens=12, ignore_eos=True))
    turn = focus_pb2.ChatTurn(role=llm_pb2.ROLE_USER, parts=[*parts, focus_pb2.ChatPart(text=text)])
    return focus_pb2.ChatRequest(turns=[turn], **fields)


def chat(channel, request: focus_pb2.ChatRequest) -> list[focus_pb2.ChatResponse]:
    stub = focus_pb2_grpc.FocusServiceStub(channel)
    return list(stub.Chat(request, timeout=60, metadata=(("application", "gateway"),)))


def text_of(events) -> str:
    return "".join(event.token.text for event in events)


def ids_of(events) -> list[int]:
    return [token for event in events for token in event.token.token_ids]


def scrape(cluster) -> str:
    with urllib.request.urlopen(cluster.metrics_url, timeout=10) as response:
        return response.read().decode()


def gauge(cluster, name: str) -> float:
    values = re.findall(rf"^ray_{name}\{{[^\n]*\}} (\S+)$", scrape(cluster), re.M)
    return sum(map(float, values)) if values else float("nan")


def until(condition, seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.3)
    return False


def test_an_answer_streams_and_accounts(channel, checkpoint):
    image = picture(1)
    events = chat(channel, question(image))
    assert [event.WhichOneof("event") for event in events] == ["started", *["token"] * 12, "finished"]
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


def test_split_over_grpc_equals_one_process(channel, checkpoint):
    """Three images and both settings; the tokens are rounded to bfloat16 in both, as they are on the wire."""
    pipeline = EncoderPipeline.from_checkpoint(checkpoint[0], dtype=torch.float32)
    engine = Engine.from_checkpoint(
        checkpoint[0], dtype=torch.float32, kv_cache_bytes=2**24, max_batch_tokens=4096, max_running=4
    )
    for seed, size, sampler in ((11, (120, 90), True), (12, (40, 200), True), (13, (90, 90), False)):
        image = picture(seed, size)
        tokens = pipeline.encode([pipeline.prepare(image)], [sampler])[0]
        engine.submit(
            GenerateRequest(
                request_id="one-process",
                turns=(ChatTurn(role="user", parts=(ImagePart(image=0), TextPart(text="What is on the card?"))),),
                images=(dataclasses.replace(tokens, tokens_ND=tokens.tokens_ND.bfloat16()),),
                sampling=SamplingParams(max_tokens=12, ignore_eos=True),
            )
        )
        alone = []
        while engine.has_work():
            alone += [event for _, event in engine.step()]
        events = chat(channel, question(image, vision_sampler_off=not sampler))
        assert text_of(events) == "".join(e.text for e in alone if isinstance(e, TokenEvent))
        assert ids_of(events) == [t for e in alone if isinstance(e, TokenEvent) for t in e.token_ids]
        assert events[-1].finished.usage.visual_tokens_kept == alone[-1].usage.visual_tokens_kept


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
                    count += 1
            return first, time.monotonic(), count

    async def both():
        return await asyncio.gather(stream(21), stream(22))

    (first_a, last_a, count_a), (first_b, last_b, count_b) = asyncio.run(both())
    assert (count_a, count_b) == (400, 400)
    assert first_a < last_b and first_b < last_a


def test_a_cancelled_call_frees_its_slot(cluster, channel):
    stub = focus_pb2_grpc.FocusServiceStub(channel)
    sampling = llm_pb2.SamplingParams(max_tokens=1000, ignore_eos=True)
    calls = [
        stub.Chat(question(picture(31), sampling=sampling), metadata=(("application", "gateway"),)) for _ in range(3)
    ]
    for call in calls:
        while next(call).WhichOneof("event") != "token":
            pass
        assert not call.done()
        call.cancel()
    ended = r'focusllava_generate_requests_total\{[^\n]*outcome="cancelled"[^\n]*\} 3'
    assert until(lambda: re.search(ended, scrape(cluster)) is not None), "the llm stage saw three calls cancelled"
    assert until(lambda: gauge(cluster, "focusllava_kv_blocks_used") == 0), "KV blocks of a cancelled call stay taken"
    assert gauge(cluster, "focusllava_running_requests") == 0
    assert gauge(cluster, "focusllava_kv_blocks_total") > 0


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


def encoded(channel, fingerprint: str, image: bytes) -> encoder_pb2.CompressedVisualTokens:
    stub = encoder_pb2_grpc.EncoderServiceStub(channel)
    request = encoder_pb2.EncodeRequest(image=image, model_fingerprint=fingerprint, vision_sampler=True)
    return stub.Encode(request, timeout=60, metadata=(("application", "encoder"),)).visual_tokens


def generated(channel, fingerprint: str, *images, parts=()) -> list[llm_pb2.GenerateResponse]:
    stub = llm_pb2_grpc.LanguageModelServiceStub(channel)
    parts = parts or [llm_pb2.PromptPart(image_index=number) for number in range(len(images))]
    request = llm_pb2.GenerateRequest(
        request_id=f"direct-{time.monotonic_ns()}",
        model_fingerprint=fingerprint,
        turns=[llm_pb2.PromptTurn(role=llm_pb2.ROLE_USER, parts=[llm_pb2.PromptPart(text="what?"), *parts])],
        images=images,
        sampling=llm_pb2.SamplingParams(max_tokens=2),
    )
    return list(stub.Generate(request, timeout=60, metadata=(("application", "llm"),)))


@pytest.mark.parametrize("wrong", ["", "0" * 64, "f" * 10])
def test_each_stage_refuses_another_fingerprint(channel, checkpoint, wrong):
    right = checkpoint[1]
    tokens = encoded(channel, right, picture(51))
    foreign = encoder_pb2.CompressedVisualTokens()
    foreign.CopyFrom(tokens)
    foreign.model_fingerprint = "0" * 64
    for call in (
        lambda: encoded(channel, wrong, picture(51)),
        lambda: generated(channel, wrong, tokens),
        lambda: generated(channel, right, foreign),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "fingerprint" in caught.value.details() and not LEAKS.search(caught.value.details())
    assert generated(channel, right, tokens)[-1].WhichOneof("event") == "finished"


def test_the_llm_stage_refuses_broken_tensors_and_indices(channel, checkpoint):
    right = checkpoint[1]
    good = encoded(channel, right, picture(52))

    def changed(**fields) -> encoder_pb2.CompressedVisualTokens:
        copy = encoder_pb2.CompressedVisualTokens()
        copy.CopyFrom(good)
        for name, value in fields.items():
            if name == "shape":
                copy.tokens.shape[:] = value
            else:
                setattr(copy.tokens, name, value)
        return copy

    index = llm_pb2.PromptPart
    nan = wire.tensor_to_proto(torch.full(tuple(good.tokens.shape), float("nan"), dtype=torch.bfloat16)).data
    cases = [
        ((changed(data=nan),), (), "NaN"),
        ((changed(data=good.tokens.data[:-1]),), (), "bytes"),
        ((changed(data_type=0),), (), "data_type"),
        ((changed(data_type=99),), (), "data_type"),
        ((changed(shape=[-1, 64]),), (), "shape"),
        ((changed(shape=[2**62, 2**62]),), (), ""),
        ((good,), (index(image_index=7),), "image"),
        ((good,), (index(image_index=0), index(image_index=0)), ""),
        ((good, good), (index(image_index=1), index(image_index=0)), ""),
        ((good,), (index(text="no image named"),), ""),
    ]
    for images, parts, says in cases:
        with pytest.raises(grpc.RpcError) as caught:
            generated(channel, right, *images, parts=parts)
        details = caught.value.details()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, details
        assert says in details and not LEAKS.search(details), details
    assert generated(channel, right, good)[-1].WhichOneof("event") == "finished"


def test_the_encoder_stage_and_an_unknown_application_answer_clearly(channel, checkpoint):
    stub = focus_pb2_grpc.FocusServiceStub(channel)
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetModelInfo(focus_pb2.GetModelInfoRequest(), timeout=30, metadata=(("application", "nobody"),))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.RpcError) as caught:
        encoded(channel, checkpoint[1], b"not an image")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT and not LEAKS.search(caught.value.details())


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


def replica_pids(cluster, application: str) -> list[int]:
    """Processes of this cluster that Ray titled as replicas of the application."""
    found = []
    for pid in cluster.state.pids():
        with contextlib.suppress(OSError):
            title = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            if title.startswith(f"ray::ServeReplica:{application}:"):
                found.append(pid)
    return found


def test_an_answer_survives_the_death_of_its_llm_replica(cluster, channel):
    request = question(picture(81), sampling=llm_pb2.SamplingParams(max_tokens=600, ignore_eos=True))
    undisturbed = ids_of(chat(channel, request))
    stub = focus_pb2_grpc.FocusServiceStub(channel)
    call = stub.Chat(request, timeout=150, metadata=(("application", "gateway"),))
    events = [next(call) for _ in range(4)]
    (replica,) = replica_pids(cluster, "llm")
    os.kill(replica, signal.SIGKILL)
    events += list(call)
    assert events[-1].WhichOneof("event") == "finished", events[-1]
    assert ids_of(events) == undisturbed and len(undisturbed) == 600
    assert until(lambda: "focusllava_stage_retries_total{" in scrape(cluster)), "it was lost, and called again"


def test_the_endpoint_has_every_metric_that_the_dashboard_draws(cluster, channel):
    """Runs last, when everything has been recorded."""
    chat(channel, question(picture(71)))
    panels = json.loads(DASHBOARD.read_text())["panels"]
    text = " ".join(target["expr"] for panel in panels for target in panel.get("targets", ()))
    drawn = set(re.findall(r"ray_[a-z_]+", text))

    def missing() -> set[str]:
        shown = set(re.findall(r"^(ray_[a-z_]+)[{ ]", scrape(cluster), re.M))
        return drawn - shown

    until(lambda: not missing(), 20)
    assert not missing()
