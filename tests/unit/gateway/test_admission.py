"""What the public door refuses, field by field, before any stage is troubled; and settings and statuses beside it."""

from __future__ import annotations

import asyncio
import math

import grpc
import pytest

from focusllava.errors import RETRY_METADATA
from focusllava.v1 import focus_pb2, image_pb2, llm_pb2
from services.common.errors import FocusError, InvalidInput, Overloaded, StageUnavailable, TooLarge
from services.common.grpc_status import MAX_MESSAGE_CHARS, check_fingerprint, refuse, status_of
from services.common.media import MediaLimits, content_hash
from services.common.settings import build_settings
from services.common.types import ImageOptions
from services.gateway.admission import AdmissionLimits, admit, request_id_of
from tests.fakes.stages import PNG, png

USER, SYSTEM, ASSISTANT = llm_pb2.ROLE_USER, llm_pb2.ROLE_SYSTEM, llm_pb2.ROLE_ASSISTANT
LIMITS = AdmissionLimits(
    max_images=2, max_turns=4, max_question_chars=20, max_text_chars=60, max_tokens=100, max_image_bytes_total=1000
)


def turn(role: int, *parts: str | bytes) -> focus_pb2.ChatTurn:
    return focus_pb2.ChatTurn(
        role=role,  # type: ignore[arg-type]
        parts=[
            focus_pb2.ChatPart(text=part) if isinstance(part, str) else focus_pb2.ChatPart(image=part) for part in parts
        ],
    )


def ask(*turns: focus_pb2.ChatTurn, **fields) -> focus_pb2.ChatRequest:
    return focus_pb2.ChatRequest(turns=turns or (turn(USER, "what?"),), **fields)


def raw(text: str | None = None, token_ids: llm_pb2.TokenIds | None = None, **fields) -> focus_pb2.ChatRequest:
    return focus_pb2.ChatRequest(raw_prompt=llm_pb2.RawPrompt(text=text, token_ids=token_ids), **fields)


def admitted(request: focus_pb2.ChatRequest):
    return admit(request, LIMITS, request_id_of(request))


def test_each_image_is_read_as_its_part_says():
    request = ask(turn(USER, PNG, PNG, "what?"))
    request.turns[0].parts[1].image_options.detail = image_pb2.IMAGE_DETAIL_LOW
    request.turns[0].parts[1].image_options.reduced_jpeg = False
    request.turns[0].parts[1].image_options.map_share = 0.3
    request.turns[0].parts[2].image_options.detail = image_pb2.IMAGE_DETAIL_LOW  # words have none
    found = [image.options for image in admitted(request).images]
    assert found == [ImageOptions(), ImageOptions(detail="low", reduced_jpeg=False, map_share=0.3)]
    request.vision_sampler_off = True
    with pytest.raises(InvalidInput, match=r"^turns\[0\]\.parts\[1\]\.image_options\.map_share: is 0.3 with the"):
        admitted(request)
    request.turns[0].parts[1].image_options.map_share = 1.5
    with pytest.raises(InvalidInput, match=r"^turns\[0\]\.parts\[1\]\.image_options\.map_share: is 1.5, expected"):
        admitted(request)
    request.turns[0].parts[0].image_options.detail = 9  # type: ignore[assignment]
    with pytest.raises(InvalidInput, match=r"^turns\[0\]\.parts\[0\]\.image_options\.detail: is 9, expected"):
        admitted(request)


def test_an_admitted_request_keeps_its_order_and_points_at_its_images():
    other = png((9, 9))
    result = admitted(
        ask(
            turn(SYSTEM, "be brief"),
            turn(USER, PNG, "and", other, "same?"),
            turn(ASSISTANT, "no"),
            turn(USER, "why?"),
            request_id="abc-1",
            vision_sampler_off=True,
        )
    )
    assert result.request_id == "abc-1" and not result.samplers.vision_sampler
    assert [image.content_hash for image in result.images] == [content_hash(PNG), content_hash(other)]
    assert [image.field for image in result.images] == ["turns[1].parts[0].image", "turns[1].parts[2].image"]
    kinds = [[part.WhichOneof("part") for part in t.parts] for t in result.turns]
    assert kinds == [["text"], ["image_index", "text", "image_index", "text"], ["text"], ["text"]]
    assert result.turns[1].parts[2].image_index == 1


def test_conversations_of_every_shape_enter():
    for turns in (
        [turn(USER, PNG)],
        [turn(USER, PNG, " ")],
        [turn(USER, "x"), turn(ASSISTANT, "y")],
        [turn(SYSTEM, "a"), turn(SYSTEM, "b"), turn(USER, "x"), turn(SYSTEM, "c")],
        [turn(SYSTEM, "alone")],
    ):
        result = admitted(ask(*turns))
        assert [t.role for t in result.turns] == [t.role for t in turns] and result.raw_prompt is None
    assert admitted(ask(turn(USER, "x"), turn(ASSISTANT, "y"), continue_final_message=True)).continue_final_message


def test_a_raw_prompt_enters_as_it_is():
    for request in (raw(text="<s>[INST] x"), raw(token_ids=llm_pb2.TokenIds(ids=[1, 7]))):
        result = admitted(request)
        assert result.raw_prompt == request.raw_prompt and not result.turns and not result.images


@pytest.mark.parametrize(
    "request_, error, says",
    [
        (focus_pb2.ChatRequest(), InvalidInput, "turns: is empty"),
        (ask(turn(USER)), InvalidInput, "turns[0].parts: is empty"),
        (ask(turn(USER, "")), InvalidInput, "the question is empty"),
        (ask(turn(USER, " \n\t ")), InvalidInput, "the question is empty"),
        (ask(turn(USER, "x"), turn(ASSISTANT, "y"), turn(USER, "")), InvalidInput, "turns[2].parts: the question is"),
        (ask(turn(USER, "x" * 21)), TooLarge, "21 characters, the limit is 20"),
        (ask(turn(USER, "x" * 20), turn(ASSISTANT, "x" * 45), turn(USER, "x")), TooLarge, "66 characters"),
        (ask(*[turn(USER, "x")] * 5), TooLarge, "5 turns, the limit is 4"),
        (ask(turn(USER, "x"), continue_final_message=True), InvalidInput, "continue_final_message: expects the last"),
        (raw(text="x", turns=[turn(USER, "x")]), InvalidInput, "turns: is set beside raw_prompt"),
        (raw(text="x", continue_final_message=True), InvalidInput, "continue_final_message: is set beside raw_prompt"),
        (raw(token_ids=llm_pb2.TokenIds()), InvalidInput, "raw_prompt.token_ids: is empty"),
        (raw(), InvalidInput, "raw_prompt: is neither text nor token_ids"),
        (raw(text="x" * 61), TooLarge, "raw_prompt: has 61 characters, the limit is 60"),
        (raw(token_ids=llm_pb2.TokenIds(ids=[1] * 61)), TooLarge, "raw_prompt: has 61 tokens, the limit is 60"),
        (ask(turn(0, "x"), turn(USER, "y")), InvalidInput, "turns[0].role: is 0"),
        (ask(turn(77, "x"), turn(USER, "y")), InvalidInput, "turns[0].role: is 77"),
        (ask(turn(SYSTEM, PNG), turn(USER, "y")), InvalidInput, "turns[0].parts[0].image: images may stand in user"),
        (ask(focus_pb2.ChatTurn(role=USER, parts=[focus_pb2.ChatPart()])), InvalidInput, "neither text nor an image"),
        (ask(turn(USER, PNG, PNG, PNG, "x")), TooLarge, "turns[0].parts[2].image: more than 2 images"),
        (ask(turn(USER, b"", "x")), InvalidInput, "turns[0].parts[0].image: has 0 bytes"),
        (ask(turn(USER, b"no", "x")), InvalidInput, "not a readable image"),
        (ask(turn(USER, PNG + bytes(1000), "x")), TooLarge, "bytes of images, the limit is 1000"),
        (ask(request_id="a b"), InvalidInput, "request_id: "),
        (ask(request_id="x" * 129), InvalidInput, "request_id: "),
        (ask(request_id="../../etc"), InvalidInput, "request_id: "),
        (ask(sampling=llm_pb2.SamplingParams(max_tokens=0)), InvalidInput, "sampling.max_tokens: is 0"),
        (ask(sampling=llm_pb2.SamplingParams(max_tokens=101)), TooLarge, "the limit is 100"),
        (ask(sampling=llm_pb2.SamplingParams(temperature=-0.5)), InvalidInput, "sampling.temperature: is -0.5"),
        (ask(sampling=llm_pb2.SamplingParams(temperature=2.5)), InvalidInput, "sampling.temperature: is 2.5"),
        (ask(sampling=llm_pb2.SamplingParams(temperature=math.nan)), InvalidInput, "sampling.temperature: is nan"),
        (ask(sampling=llm_pb2.SamplingParams(top_p=0)), InvalidInput, "sampling.top_p: is 0"),
        (ask(sampling=llm_pb2.SamplingParams(top_p=1.5)), InvalidInput, "sampling.top_p: is 1.5"),
        (ask(sampling=llm_pb2.SamplingParams(top_p=math.nan)), InvalidInput, "sampling.top_p: is nan"),
        (ask(sampling=llm_pb2.SamplingParams(stop=["a"] * 9)), InvalidInput, "sampling.stop: has 9 strings"),
        (ask(sampling=llm_pb2.SamplingParams(stop=["a", ""])), InvalidInput, "sampling.stop[1]: is empty"),
        (ask(sampling=llm_pb2.SamplingParams(stop=["a" * 257])), InvalidInput, "sampling.stop[0]: has 257 characters"),
        (ask(prune=llm_pb2.PruneParams(threshold=0)), InvalidInput, "prune.threshold: is 0.0, expected (0, 1]"),
        (ask(prune=llm_pb2.PruneParams(threshold=1.5)), InvalidInput, "prune.threshold: is 1.5"),
        (ask(prune=llm_pb2.PruneParams(threshold=-1)), InvalidInput, "prune.threshold: is -1"),
        (ask(prune=llm_pb2.PruneParams(threshold=math.nan)), InvalidInput, "prune.threshold: is nan"),
        (ask(prune=llm_pb2.PruneParams(keep_ratio=1.5)), InvalidInput, "prune.keep_ratio: is 1.5, expected (0, 1]"),
        (ask(prune=llm_pb2.PruneParams(keep_ratio=0.5, threshold=0.5)), InvalidInput, "expected one of the two"),
        (ask(sampling=llm_pb2.SamplingParams(logprobs=21)), InvalidInput, "sampling.logprobs: is 21, expected [0, 20]"),
        (ask(sampling=llm_pb2.SamplingParams(min_p=1.1)), InvalidInput, "sampling.min_p: is 1.1, expected [0, 1]"),
    ],
)
def test_refused_with_the_field_and_the_value(request_, error, says):
    with pytest.raises(error) as caught:
        admitted(request_)
    assert says in str(caught.value)


@pytest.mark.parametrize("gamma", [1.0, 0.001])
def test_values_at_the_edge_are_admitted(gamma):
    sampling = llm_pb2.SamplingParams(max_tokens=100, temperature=2, top_p=1, stop=["x"] * 8, logprobs=20, top_k=5)
    request = ask(turn(USER, "x" * 20), sampling=sampling, prune=llm_pb2.PruneParams(threshold=gamma))
    assert admitted(request).sampling == sampling


@pytest.mark.parametrize("limit, reaches_the_stage", [(16, 16), (256, 0), (300, 0)])
def test_a_request_that_names_no_number_of_tokens_gets_no_more_than_the_limit(limit, reaches_the_stage):
    request = ask(sampling=llm_pb2.SamplingParams(top_k=5))
    sampling = admit(request, AdmissionLimits(max_tokens=limit), "r1").sampling
    assert (sampling.max_tokens, sampling.top_k) == (reaches_the_stage, 5), "0: unset, the stage's default of 256"
    assert not request.sampling.HasField("max_tokens")


def test_an_unfit_id_is_not_echoed():
    assert request_id_of(ask(request_id="ok.1:2-3_4")) == "ok.1:2-3_4"
    made = {request_id_of(ask(request_id=bad)) for bad in ("", "a\nb", "é")}
    assert len(made) == 3 and all(len(one) == 32 for one in made)


def test_settings_are_checked_with_their_path():
    limits = build_settings(AdmissionLimits, {"max_images": 3, "media": {"max_bytes": 5, "max_aspect_ratio": 2}})
    assert limits.max_images == 3 and limits.media == MediaLimits(max_bytes=5, max_aspect_ratio=2.0)
    for raw, says in [
        ({"max_imgaes": 3}, "args.max_imgaes: unknown setting"),
        ({"max_images": "3"}, "args.max_images: is '3', expected int"),
        ({"max_images": True}, "args.max_images: is True, expected int"),
        ({"media": {"max_bytes": None}}, "args.media.max_bytes: is None"),
        ({"media": 5}, "args.media: is 5, expected a mapping"),
        ({"max_images": 0}, "args.max_images: is 0, expected 1 or more"),
        ({"max_text_chars": -1}, "args.max_text_chars: is -1, expected 1 or more"),
        ({"max_image_bytes_total": 0}, "args.max_image_bytes_total: is 0, expected 1 or more"),
        ({"media": {"max_pixels": -5}}, "args.media.max_pixels: is -5, expected 1 or more"),
    ]:
        with pytest.raises(InvalidInput) as caught:
            build_settings(AdmissionLimits, raw, "args.")
        assert str(caught.value).startswith(says) and caught.value.field == says.split(":")[0]


def test_settings_over_others_change_what_they_name_at_any_depth():
    ours = AdmissionLimits(max_turns=4, media=MediaLimits(max_bytes=1000))
    limits = build_settings(AdmissionLimits, {"max_images": 3, "media": {"max_side": 50}}, over=ours)
    assert limits == AdmissionLimits(max_turns=4, max_images=3, media=MediaLimits(max_bytes=1000, max_side=50))
    assert build_settings(AdmissionLimits, None, over=ours) == ours


class Context:
    metadata = (("request_id", "Ray's"), ("x-request-id", "r1"))

    def set_code(self, code):
        self.code = code

    def set_details(self, details):
        self.details = details

    def trailing_metadata(self):
        return self.metadata

    def set_trailing_metadata(self, metadata):
        self.metadata = metadata


@pytest.mark.parametrize(
    "error, code, says",
    [
        (InvalidInput("is 3", field="x"), grpc.StatusCode.INVALID_ARGUMENT, "x: is 3"),
        (TooLarge("big"), grpc.StatusCode.RESOURCE_EXHAUSTED, "big"),
        (StageUnavailable("gone"), grpc.StatusCode.UNAVAILABLE, "gone"),
        (TimeoutError(), grpc.StatusCode.DEADLINE_EXCEEDED, "the request took longer than its deadline"),
        (RuntimeError("/secret/path line 3"), grpc.StatusCode.INTERNAL, "internal error, request id r1"),
        (KeyError("token"), grpc.StatusCode.INTERNAL, "internal error, request id r1"),
    ],
)
def test_a_client_sees_a_status_and_one_line(error, code, says, caplog):
    context = Context()
    refused = refuse(context, error, "r1")
    assert (context.code, context.details) == (code, says) and says in str(refused)
    if code is grpc.StatusCode.INTERNAL:
        assert "r1" in caplog.text and type(error).__name__ in caplog.text, "the log has what the client does not"


def test_who_comes_too_early_is_told_when_to_come_back_and_who_asks_too_much_is_not():
    full, large = Context(), Context()
    refuse(full, Overloaded("full", retry_after_s=0.0801), "r1")
    refuse(large, TooLarge("big"), "r1")
    assert full.metadata == [("x-request-id", "r1"), (RETRY_METADATA, "81")]
    assert large.metadata == Context.metadata


def test_messages_are_one_bounded_line():
    message = status_of(FocusError("a\nb\x1b[31m" + "x" * 9999))[1]
    assert message.startswith("a b [31m") and len(message) == MAX_MESSAGE_CHARS and message.endswith("...")


def test_cancellation_is_not_an_error_to_map():
    assert not issubclass(asyncio.CancelledError, Exception)  # what every edge's `except Exception` relies on


@pytest.mark.parametrize("asked, says", [("", "is empty"), ("f" * 64, "is ffffffffffff...")])
def test_another_fingerprint_is_refused(asked, says):
    check_fingerprint("a" * 64, "a" * 64)
    with pytest.raises(FocusError, match=says) as caught:
        check_fingerprint(asked, "a" * 64)
    assert caught.value.code.value == "FAILED_PRECONDITION"
