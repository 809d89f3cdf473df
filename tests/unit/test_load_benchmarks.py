"""The parts of the load benchmarks: arrival times, what an open loop makes of answers, storms' inputs and verdicts."""

from __future__ import annotations

import math
import random
import time

import grpc
import pytest

from benchmarks.clusters import CHANGED, changed_config
from benchmarks.open_loop import Client, Goal, Outcome, Target, burst_times, poisson_times, summary
from benchmarks.questions import Photos, Posters, known_or_new, size_hw
from benchmarks.serving import asked, goodput_ratios, per_request
from benchmarks.storm.doors import LEAKS
from benchmarks.storm.hostile import CLASSES, fault_of
from benchmarks.storm.mutations import (
    VALID,
    hostile_http,
    hostile_image,
    mutated_bytes,
    mutated_json,
    mutated_message,
    mutated_text,
)
from benchmarks.storm.soak import slope
from focusllava import user
from focusllava.errors import RETRY_METADATA
from focusllava.wire import build_request
from services.common.media import open_image
from tests.fakes.gateway import ScriptedGateway, failed, started, token

GOAL = Goal(ttft_s=1.0, tpot_s=0.1)


def test_arrivals_have_the_rate_and_bursts_come_together():
    poisson, bursts = poisson_times(20, 200, seed=1), burst_times(20, 200, 16, seed=1)
    for times in (poisson, bursts):
        assert times == sorted(times) and 0 < times[0] and times[-1] < 200
        assert len(times) == pytest.approx(4000, rel=0.2)
    assert len(set(poisson)) == len(poisson) and len(set(bursts)) * 16 == len(bursts)
    gaps = [b - a for a, b in zip(poisson, poisson[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert deviation == pytest.approx(mean, rel=0.1), "independent arrivals: gaps vary as much as they last"
    assert poisson == poisson_times(20, 200, seed=1) != poisson_times(20, 200, seed=2)


def test_an_answer_is_good_within_both_times_and_only_an_answer():
    def answer(*times, **named):
        return Outcome(lag_s=0.0, token_times=times, **named)

    assert answer(0.9, 0.95, 1.05).meets(GOAL) and answer(1.0).meets(GOAL)
    assert not answer(1.01).meets(GOAL), "the first token is late"
    assert not answer(0.5, 0.6, 0.8).meets(GOAL), "0.15 s a token"
    assert not Outcome(lag_s=0.0, code="UNAVAILABLE").meets(GOAL)
    outcomes = [
        answer(0.5, 0.6, right=True, cached=(True,), visual_tokens=10),
        answer(2.0, right=False, cached=(False,), visual_tokens=30, level=2),
        Outcome(lag_s=0.2, code="RESOURCE_EXHAUSTED", retry_after_s=1.0),
        Outcome(lag_s=0.0, code="INTERNAL"),
    ]
    figures = summary(outcomes, 2.0, GOAL, until_last_s=4.0)
    assert (figures["offered_per_s"], figures["goodput_per_s"], figures["answered_per_s"]) == (2.0, 0.5, 0.5)
    assert (figures["refused"], figures["failed"]) == (1, 1)
    assert (figures["score"], figures["good_score"], figures["cache_hits"]) == (50, 100, 50)
    assert (figures["visual_tokens"], figures["level"]) == (20, 1)
    assert math.isnan(summary([], 2.0, GOAL)["ttft_p50_ms"])
    assert per_request({"gateway": 0.01}, outcomes) == {"ms of gateway": 5.0}


def test_what_was_asked_is_told_without_keys_and_addresses():
    words = ["--target", "h:1", "--api-key", "fl-x", "--rates", "5", "--change", '{"gateway": {}}', "--out", "x.json"]
    assert asked(words) == "--rates 5 --change '{\"gateway\": {}}'"


def test_ratios_of_goodput_are_within_rounds():
    def turns(*goodput):
        return [{"goodput_per_s": each} for each in goodput]

    assert goodput_ratios({"a": turns(1, 2), "b": turns(3, 4)}) == {"b/a": (2.5, 2.0, 3.0)}
    assert goodput_ratios({"a": turns(0, 2), "b": turns(3, 4)}) == {}, "no ratio to nothing"


def test_the_same_seed_asks_the_same_and_new_files_are_the_same_picture():
    work = Posters(3, reuse=1.0)
    questions = work.questions(30, seed=5)
    assert questions == work.questions(30, seed=5) != work.questions(30, seed=6)
    assert {question.image for question in questions} == set(work.images)
    right = questions[0]
    assert right.is_right(f"{right.expected}.") and not right.is_right("no such thing")
    image, rng = work.images[0], random.Random(0)
    new = known_or_new(image, rng, 0.0)
    assert new != image != known_or_new(image, rng, 0.0) != new
    assert open_image(new).image == open_image(image).image
    photos = Photos(4, 0.5, [(64, 48), (32, 80)], tokens=7)
    assert [open_image(photo).size_hw for photo in photos.images] == [(64, 48), (32, 80)] * 2
    assert all(q.expected is None and q.is_right("x") is None for q in photos.questions(5, 0))
    assert size_hw("672x1008") == (672, 1008)


def test_a_second_gateway_shares_the_stages_that_nothing_was_said_of():
    config = changed_config({"gateway": {"load_compression": {"map_share": [0.5, 0.2]}}, "llm": {"max_running": 4}})
    found = {application["name"]: application for application in config["applications"]}
    assert set(found) == {"gateway", "encoder", "llm", "gateway" + CHANGED, "llm" + CHANGED}
    assert len({application["route_prefix"] for application in found.values()}) == 5
    args = found["gateway" + CHANGED]["args"]
    assert args["encoder"] == {"application": "encoder"} and args["llm"] == {"application": "llm" + CHANGED}
    assert "load_compression" in args and "load_compression" not in found["gateway"]["args"]
    assert found["llm" + CHANGED]["args"] == {"max_running": 4}


async def test_an_open_loop_asks_at_its_moments_and_tells_every_ending():
    question = Posters(1, 1.0).questions(1, 0)[0]
    gateway, client = ScriptedGateway(), None
    asked: list[float] = []

    def script(request, context):
        asked.append(time.perf_counter())
        if len(asked) == 1:
            yield from gateway.answer(request, context)
        elif len(asked) == 2:
            context.set_trailing_metadata(((RETRY_METADATA, "250"),))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        else:
            yield from (started(), token("a"), failed("INTERNAL", "broken"))

    gateway.script = script
    try:
        client = Client(Target(address=gateway.address, settings={"map_share": 0.5, "top_k": 3}), 30)
        answered, refused, broken = await client.open_loop([question] * 3, [0.0, 0.4, 0.8])
    finally:
        if client:
            await client.close()
        gateway.stop()
    assert [later - asked[0] for later in asked[1:]] == [pytest.approx(0.4, abs=0.3), pytest.approx(0.8, abs=0.3)]
    assert answered.code == "OK" and len(answered.token_times) == 4 and answered.cached == (False,)
    assert answered.right is False and answered.visual_tokens == 50
    assert (refused.code, refused.retry_after_s, broken.code) == ("RESOURCE_EXHAUSTED", 0.25, "INTERNAL")
    request = gateway.requests[0]
    assert request.turns[0].parts[0].image_options.map_share == 0.5 and request.sampling.top_k == 3


def test_mutations_are_hostile_and_the_same_for_a_seed():
    message = build_request([user("what?", images=VALID[:2])], max_tokens=3, stop=["x"], logit_bias={5: 1.0})
    body = {"messages": [{"role": "user", "content": "what?"}], "max_tokens": 3}
    before = message.SerializeToString()
    for make, original in (
        (lambda rng: mutated_message(message, rng).SerializeToString(), before),
        (lambda rng: mutated_bytes(before, rng), before),
        (lambda rng: mutated_json(body, rng), body),
        (lambda rng: mutated_text(body, rng), None),
        (hostile_image, None),
        (hostile_http, None),
    ):
        made = [make(random.Random(seed)) for seed in range(200)]
        assert repr(made) == repr([make(random.Random(seed)) for seed in range(200)])
        assert sum(each != original for each in made) > 150 and len(set(map(repr, made))) > 30
    assert message.SerializeToString() == before and body["max_tokens"] == 3, "the original stays"


@pytest.mark.parametrize(
    "said, decides, fault",
    [
        (("OK", ""), False, None),
        (("INVALID_ARGUMENT", "turns: is empty"), False, None),
        (("INVALID_ARGUMENT", "/tmp/ray/session/x.sock"), False, "INVALID_ARGUMENT that tells internals"),
        (("INTERNAL", "internal error"), False, "INTERNAL"),
        (("400", 'Traceback (most recent call last):\n  File "x.py"'), False, "400 that tells internals"),
        (("500", "Internal Server Error"), False, "500"),
        (("no end", ""), False, "no end"),
        (("DEADLINE_EXCEEDED", ""), True, None),
        (("DEADLINE_EXCEEDED", ""), False, "DEADLINE_EXCEEDED"),
        (("504", "late"), True, None),
    ],
)
def test_what_no_input_may_cause(said, decides, fault):
    assert fault_of(said, decides) == fault
    assert len(CLASSES) >= 16 and not LEAKS.search("messages[0].content[0].image_url.url: is no image")


def test_the_slope_of_a_line_and_of_noise_around_a_level():
    assert slope([(x, 3 * x + 7) for x in range(10)]) == pytest.approx(3)
    assert abs(slope([(x, 5 + (-1) ** x) for x in range(1000)])) < 1e-4
    assert slope([(1.0, 2.0)]) == 0
