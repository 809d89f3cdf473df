"""Stage clients against real gRPC servers that lose requests, and the chat service on top of them."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest

from focusllava.errors import RETRY_METADATA
from focusllava.v1 import focus_pb2, llm_pb2
from services.common import wire
from services.common.errors import (
    DeadlineExceeded,
    FocusError,
    InternalError,
    InvalidInput,
    Overloaded,
    StageUnavailable,
    TooLarge,
)
from services.common.stage_secret import SECRET_METADATA, SECRET_VARIABLE
from services.common.types import ImageOptions
from services.gateway.callers import Caller
from services.gateway.chat import ChatService
from services.gateway.deadline import Deadline
from services.gateway.replicas import CHANNEL_OPTIONS
from services.gateway.stage_errors import stage_error
from services.gateway.stages import LanguageModelClient
from tests.fakes.stages import DIED, WORDS, Encoder, LanguageModel, logprobs, service, serving
from tests.unit.gateway.test_admission import PNG, USER, ask, turn
from tests.unit.gateway.test_cache import KEY, message_for


def request(**sampling) -> llm_pb2.GenerateRequest:
    return llm_pb2.GenerateRequest(request_id="r", sampling=llm_pb2.SamplingParams(**sampling))


async def answer(client: LanguageModelClient, asked: llm_pb2.GenerateRequest) -> tuple[str, list[int]]:
    text, ids = "", []
    async for event in client.generate(asked, Deadline()):
        text += event.token.text
        ids += event.token.token_ids
    return text, ids


async def test_the_metadata_name_the_application_and_bear_the_clusters_secret(monkeypatch):
    monkeypatch.setenv(SECRET_VARIABLE, "f" * 64)
    model = LanguageModel()
    async with serving(model) as (_, client):
        await answer(client, request())
    assert model.metadata[0]["application"] == "llm" and model.metadata[0][SECRET_METADATA] == "f" * 64


async def test_a_refused_secret_is_told_at_once_and_in_the_log(caplog):
    model = LanguageModel(*[(0, grpc.StatusCode.UNAUTHENTICATED, "no")] * 3)
    async with serving(model) as (_, client):
        with pytest.raises(FocusError, match="the llm stage refuses this gateway"):
            await answer(client, request())
    assert len(model.requests) == 1 and SECRET_VARIABLE in caplog.text


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED])
@pytest.mark.parametrize("lost_after", [0, 1, 4])
async def test_a_lost_stage_is_tried_again_and_no_text_repeats(code, lost_after):
    model = LanguageModel((lost_after, code, DIED), (2, code, DIED))
    async with serving(model) as (_, client):
        assert await answer(client, request()) == ("".join(WORDS), list(range(len(WORDS))))
    assert [r.request_id for r in model.requests] == ["r", "r.1", "r.2"]


async def test_log_probabilities_come_once_a_token_after_a_lost_stage():
    model = LanguageModel((3, grpc.StatusCode.UNAVAILABLE, DIED))
    async with serving(model) as (_, client):
        events = [event async for event in client.generate(request(logprobs=0), Deadline())]
    found = [entry for event in events for entry in event.token.logprobs]
    assert found == [logprobs(number) for number in range(len(WORDS))] and len(model.requests) == 2


async def test_draws_that_cannot_be_repeated_are_retried_before_the_first_token_only():
    lost = (grpc.StatusCode.UNAVAILABLE, "")
    async with serving(LanguageModel((0, *lost))) as (_, client):
        assert (await answer(client, request(temperature=1.0)))[0] == "".join(WORDS)
    async with serving(LanguageModel((1, *lost))) as (_, client):
        with pytest.raises(StageUnavailable):
            await answer(client, request(temperature=1.0))
    async with serving(LanguageModel((1, *lost))) as (_, client):
        assert (await answer(client, request(temperature=1.0, seed=3)))[0] == "".join(WORDS)


async def test_a_different_answer_is_not_glued_on():
    model = LanguageModel((3, grpc.StatusCode.UNAVAILABLE, ""))
    async with serving(model) as (_, client):
        events = client.generate(request(), Deadline())
        assert (await anext(events)).token.text == "The "
        model.words = ["A ", "dog."]
        with pytest.raises(FocusError, match="could not be continued"):
            async for _event in events:
                pass


class Tries(LanguageModel):
    """Plays a list of (text, token ids) a call, each but the last followed by the loss of the stage."""

    def __init__(self, *tries):
        super().__init__()
        self.tries = list(tries)

    async def Generate(self, request, context):
        for text, token_ids in self.tries.pop(0):
            yield llm_pb2.GenerateResponse(token=llm_pb2.Token(text=text, token_ids=token_ids))
        if self.tries:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "")
        yield llm_pb2.GenerateResponse(finished=llm_pb2.Finished(reason=llm_pb2.FINISH_REASON_STOP))


async def test_a_replay_in_other_pieces_is_continued_in_the_middle_of_one():
    first, second = [("The ", [1]), ("ca", [2, 3])], [("The card", [1, 2, 3, 4]), (" says", [5])]
    async with serving(Tries(first, [("Th", [1])], second)) as (_, client):
        assert await answer(client, request()) == ("The card says", [1, 2, 3, 4, 5])


@pytest.mark.parametrize(
    "first, second, sent",
    [
        ([("The ", [1]), ("card ", [2]), ("says ", [3])], [("The ", [1]), ("card ", [2])], "The card says "),
        ([("sev", [1]), ("en", [2])], [("sev", [1]), ("en", [])], "seven"),
        ([("sev", [1]), ("en", [2])], [("s", [3]), ("e", [4]), ("v", [5]), ("e", [6]), ("n", [7])], "seven"),
        ([("a", [1])], [("b", [1])], "a"),
    ],
    ids=["shorter", "fewer tokens", "other tokens of the same text", "other text of the same tokens"],
)
async def test_what_a_replay_does_not_repeat_is_not_taken_for_the_answer(first, second, sent):
    got = ""
    async with serving(Tries(first, second)) as (_, client):
        with pytest.raises(FocusError, match="could not be continued"):
            async for event in client.generate(request(), Deadline()):
                assert event.WhichOneof("event") == "token"
                got += event.token.text
    assert got == sent


def test_no_keepalive_that_a_server_would_take_for_abuse():
    assert not [name for name, _ in CHANNEL_OPTIONS if "keepalive" in name or "ping" in name]


async def test_gives_up_after_its_attempts():
    lost = (0, grpc.StatusCode.UNAVAILABLE, "")
    model = LanguageModel(lost, lost, lost, lost)
    async with serving(model) as (_, client):
        with pytest.raises(StageUnavailable, match="llm stage is restarting"):
            await answer(client, request())
    assert len(model.requests) == 3


async def test_a_refusal_is_not_tried_again():
    model = LanguageModel((0, grpc.StatusCode.INVALID_ARGUMENT, "turns: no"))
    async with serving(model) as (_, client):
        with pytest.raises(InvalidInput, match="^turns: no$"):
            await answer(client, request())
    assert len(model.requests) == 1


async def test_closing_the_stream_cancels_the_stage():
    model = LanguageModel(words=["x "] * 1000, pause_s=0.01)
    async with serving(model) as (_, client):
        events = client.generate(request(), Deadline())
        await anext(events)
        await events.aclose()
        await asyncio.wait_for(model.cancelled.wait(), 5)


async def test_a_deadline_reaches_the_stage():
    model = LanguageModel(words=["x "] * 1000, pause_s=0.01)
    async with serving(model) as (_, client):
        with pytest.raises(DeadlineExceeded):
            async for _event in client.generate(request(), Deadline(0.2)):
                pass
        # gRPC rounds a timeout up on the wire.
        assert model.time_remaining_s < 0.25
        with pytest.raises(DeadlineExceeded):
            await anext(client.generate(request(), Deadline(0)))


async def test_encode_is_tried_again_and_names_the_fingerprint():
    encoder = Encoder((grpc.StatusCode.UNAVAILABLE, ""), (grpc.StatusCode.INTERNAL, DIED))
    async with serving(encoder=encoder) as (client, _):
        options = ImageOptions(detail="low", reduced_jpeg=False)
        assert await client.encode(b"image", True, options, Deadline()) == message_for(KEY)
    assert len(encoder.requests) == 3 and encoder.requests[0].model_fingerprint == KEY.model_fingerprint
    assert [wire.image_options_from_proto(request.options) for request in encoder.requests] == [options] * 3


@pytest.mark.parametrize(
    "code, details, error, says",
    [
        ("RESOURCE_EXHAUSTED", "request: needs 9 blocks", TooLarge, "needs 9 blocks"),
        ("NOT_FOUND", "Application 'encoder' not found", StageUnavailable, "not deployed"),
        ("DEADLINE_EXCEEDED", "", DeadlineExceeded, "deadline"),
        ("INTERNAL", 'Traceback ... File "/srv/x.py"', FocusError, "^the encoder stage failed$"),
        ("UNKNOWN", "/srv/x.py", FocusError, "^the encoder stage failed$"),
        ("UNIMPLEMENTED", "/srv/x.py", FocusError, "^the encoder stage failed$"),
    ],
)
def test_a_stage_status_becomes_our_error(code, details, error, says):
    failure = stage_error("encoder", grpc.StatusCode[code], details)
    assert type(failure) is error
    with pytest.raises(error, match=says):
        raise failure


@pytest.mark.parametrize(
    "details, says",
    [
        ("9 calls wait, the limit is 8 (max_queued_requests)", "^the llm stage is full; try again later$"),
        ("sampling.constraint: 64 others wait to be compiled", "^sampling.constraint: 64 others wait"),
    ],
)
async def test_a_stage_that_says_when_to_come_back_is_full_and_no_request_too_large(details, says):
    refused = (0, grpc.StatusCode.RESOURCE_EXHAUSTED, details, ((RETRY_METADATA, "2500"),))
    async with serving(LanguageModel(refused)) as clients:
        with pytest.raises(Overloaded, match=says) as caught:
            await chat(service(*clients), ask())
    assert caught.value.retry_after_s == 2.5


async def chat(service: ChatService, request: focus_pb2.ChatRequest) -> list[focus_pb2.ChatResponse]:
    return [event async for event in service.chat(request, "r1", Deadline(), Caller())]


def kinds(events) -> list[str]:
    return [event.WhichOneof("event") for event in events]


async def test_events_come_in_order_and_a_failure_after_the_first_is_an_event():
    async with serving() as clients:
        events = await chat(service(*clients), ask(turn(USER, PNG, "what?")))
    assert kinds(events) == ["started", *["token"] * len(WORDS), "finished"]
    assert events[0].started.request_id == "r1" and list(events[0].started.images[0].notes) == ["a note"]
    assert events[-1].finished.usage.time_to_first_token_ms > 0

    broken = LanguageModel((2, grpc.StatusCode.INTERNAL, 'File "/srv/x.py", line 3'))
    async with serving(broken) as clients:
        events = await chat(service(*clients), ask())
    assert kinds(events) == ["started", "token", "token", "error"]
    assert (events[-1].error.code, events[-1].error.message) == ("INTERNAL", "the llm stage failed")


async def test_a_refusal_by_a_stage_comes_before_any_event():
    refused = (grpc.StatusCode.RESOURCE_EXHAUSTED, "request: too long")
    async with serving(LanguageModel((0, *refused))) as clients:
        with pytest.raises(TooLarge, match="request: too long"):
            await chat(service(*clients), ask())
    damaged = Encoder((grpc.StatusCode.INVALID_ARGUMENT, "image: is a truncated or damaged PNG file"))
    async with serving(encoder=damaged) as clients:
        with pytest.raises(InvalidInput, match=r"^turns\[0\].parts\[1\].image: is a truncated"):
            await chat(service(*clients), ask(turn(USER, "what?", PNG)))
        with pytest.raises(TooLarge):
            await chat(service(*clients), ask(sampling=llm_pb2.SamplingParams(max_tokens=10**6)))


async def test_visual_tokens_that_the_model_refuses_are_our_fault_and_leave_the_cache():
    """They hold NaN: out of an encoder, or out of a cache that someone wrote to."""
    refused = (0, grpc.StatusCode.INVALID_ARGUMENT, "images[0].tokens: holds NaN, infinity, or values beyond")
    encoder = Encoder()
    async with serving(LanguageModel(refused), encoder) as clients:
        gateway = service(*clients)
        with pytest.raises(InternalError, match="an image's visual tokens were of no use; try again"):
            await chat(gateway, ask(turn(USER, PNG, "what?")))
        await gateway._cache.flush()
        events = await chat(gateway, ask(turn(USER, PNG, "what?")))
    assert kinds(events)[-1] == "finished" and not events[0].started.images[0].cached
    assert len(encoder.requests) == 2


async def test_a_deadline_that_has_passed_starts_nothing():
    async with serving() as clients:
        late, begun = service(*clients), []
        late._cache.get_or_encode = lambda *args: begun.append(args)  # a coroutine made here would never be awaited
        with pytest.raises(DeadlineExceeded):
            await anext(late.chat(ask(turn(USER, PNG, "what?")), "r1", Deadline(0.0), Caller()))
    assert begun == []


async def test_a_sampled_request_without_seed_gets_one_so_that_it_can_be_repeated():
    model = LanguageModel((2, grpc.StatusCode.UNAVAILABLE, ""))
    async with serving(model) as clients:
        events = await chat(service(*clients), ask(sampling=llm_pb2.SamplingParams(temperature=1)))
    assert kinds(events)[-1] == "finished"
    first, second = model.requests
    assert first.sampling.HasField("seed") and first.sampling == second.sampling
    assert first.request_id.startswith("r1.") and second.request_id == first.request_id + ".1"


async def test_every_setting_reaches_the_model_and_log_probabilities_come_back():
    sampling = llm_pb2.SamplingParams(
        max_tokens=9, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.5, presence_penalty=-1,
        frequency_penalty=0.5, seed=4, logprobs=2, stop=["x"], ignore_eos=True,
    )  # fmt: skip
    prune = llm_pb2.PruneParams(keep_ratio=0.5)
    model = LanguageModel()
    async with serving(model) as clients:
        events = await chat(service(*clients), ask(sampling=sampling, prune=prune))
    assert model.requests[0].sampling == sampling and model.requests[0].prune == prune
    assert [event.token.logprobs[0] for event in events[1:-1]] == [logprobs(number) for number in range(len(WORDS))]


async def test_same_image_twice_in_one_request_is_encoded_once():
    encoder = Encoder()
    async with serving(encoder=encoder) as clients:
        events = await chat(service(*clients), ask(turn(USER, PNG, PNG, "same?")))
    assert len(encoder.requests) == 1 and len(events[0].started.images) == 2
