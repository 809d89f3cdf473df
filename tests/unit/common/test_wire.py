"""Requests and events on the wire: all survive the round trip, and everything malformed is refused by name."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from focusllava.v1 import error_pb2, llm_pb2
from services.common import wire
from services.common.errors import Code, FocusError, InvalidInput, TooLarge, WrongFingerprint
from services.common.types import (
    Constraint,
    FinishedEvent,
    GenerateRequest,
    ImagePart,
    PromptTurn,
    SamplerSettings,
    SamplingParams,
    TextPart,
    TokenEvent,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)
from tests.unit.common.test_wire_tensors import FINGERPRINT, same_tokens, visual_tokens

# Every value differs from its default, so that none that is lost goes unnoticed.
SAMPLING = SamplingParams(
    max_tokens=7,
    temperature=0.7,
    top_k=40,
    top_p=0.9,
    min_p=0.05,
    repetition_penalty=1.1,
    presence_penalty=-0.3,
    frequency_penalty=0.2,
    seed=2**64 - 1,
    logprobs=5,
    stop=("a", "\n"),
    ignore_eos=True,
    min_tokens=3,
    stop_token_ids=(7, 9),
    logit_bias=((5, -100.0), (6, 0.85)),
    include_stop_str_in_output=True,
    constraint=Constraint(kind="json_schema", text='{"type": "object"}'),
    keep_special_tokens=True,
)


def generate_request(**changes: object) -> GenerateRequest:
    request = GenerateRequest(
        request_id="r-1",
        turns=(
            PromptTurn(role="system", parts=(TextPart(text="Be brief."),)),
            PromptTurn(role="user", parts=(ImagePart(image=0), TextPart(text="What? 你好"))),
            PromptTurn(role="assistant", parts=(TextPart(text=""),)),
            PromptTurn(role="user", parts=(ImagePart(image=1), TextPart(text="And this?"))),
        ),
        images=(visual_tokens(), visual_tokens(branch_ids_M=torch.empty(0, dtype=torch.uint8), notes=())),
        sampling=SAMPLING,
        samplers=SamplerSettings(threshold=0.85),
    )
    return dataclasses.replace(request, **changes)


def test_generate_request_round_trip() -> None:
    request = generate_request(continue_final_message=True, return_decision=True)
    data = wire.generate_request_to_proto(request, FINGERPRINT).SerializeToString()
    back = wire.generate_request_from_proto(llm_pb2.GenerateRequest.FromString(data))
    assert all(same_tokens(a, b) for a, b in zip(back.images, request.images, strict=True))
    # 0.85 must come back as 0.85, not as the nearest float32.
    assert dataclasses.replace(back, images=()) == dataclasses.replace(request, images=())


def test_unset_fields_take_the_defaults() -> None:
    message = wire.generate_request_to_proto(generate_request(), FINGERPRINT)
    message.ClearField("sampling")
    message.ClearField("prune")
    back = wire.generate_request_from_proto(message)
    assert back.sampling == SamplingParams() and back.samplers == SamplerSettings()


def test_every_setting_is_sent() -> None:
    for params, message in ((SAMPLING, llm_pb2.SamplingParams), (SamplerSettings(), llm_pb2.PruneParams)):
        ours, wires = {field.name for field in dataclasses.fields(params)}, set(message.DESCRIPTOR.fields_by_name)
        assert ours - {"vision_sampler", "text_sampler"} == wires - {"off"}
    assert not any(getattr(SAMPLING, f.name) == f.default for f in dataclasses.fields(SAMPLING))


@pytest.mark.parametrize(
    "samplers",
    [
        SamplerSettings(text_sampler=False),
        SamplerSettings(threshold=1.0),
        SamplerSettings(keep_ratio=0.49),
        SamplerSettings(),
    ],
)
def test_sampler_settings_round_trip(samplers: SamplerSettings) -> None:
    assert wire.samplers_from_proto(wire.samplers_to_proto(samplers)) == samplers


def test_zero_and_unset_differ() -> None:
    assert wire.sampling_from_proto(wire.sampling_to_proto(SamplingParams(seed=0))).seed == 0
    assert wire.sampling_from_proto(wire.sampling_to_proto(SamplingParams())).seed is None
    assert wire.sampling_from_proto(wire.sampling_to_proto(SamplingParams(logprobs=0))).logprobs == 0
    assert wire.sampling_from_proto(llm_pb2.SamplingParams()) == SamplingParams()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("min_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", 2.01),
        ("repetition_penalty", float("nan")),
        ("presence_penalty", -2.01),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", 2.01),
        ("frequency_penalty", float("inf")),
        ("logprobs", 21),
        ("stop", ["x"] * 9),
        ("stop", ["x", ""]),
        ("stop", ["x", "x" * 257]),
        ("min_tokens", 257),
        ("stop_token_ids", range(65)),
        ("logit_bias", {1: 100.01}),
        ("logit_bias", {1: -100.01}),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
    ],
)
def test_sampling_out_of_range_is_refused(name: str, value: object) -> None:
    with pytest.raises(InvalidInput) as caught:
        wire.sampling_from_proto(llm_pb2.SamplingParams(**{name: value}))
    assert caught.value.field.removesuffix("[1]") == f"sampling.{name}"


def test_values_at_the_edges_of_their_ranges_are_taken() -> None:
    for name, values in {
        "temperature": (0, 2), "top_k": (0, 2**32 - 1), "top_p": (1e-30, 1), "min_p": (0, 1), "logprobs": (0, 20),
        "repetition_penalty": (1e-30, 2), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2),
        "seed": (0, 2**64 - 1), "max_tokens": (1, 2**32 - 1), "stop": (["x" * 256] * 8,),
        "min_tokens": (0, 256), "stop_token_ids": (list(range(64)),),
    }.items():  # fmt: skip
        for value in values:
            params = wire.sampling_from_proto(llm_pb2.SamplingParams(**{name: value}))
            assert getattr(params, name) == (tuple(value) if isinstance(value, list) else value)


CONSTRAINTS = [
    Constraint(kind="json_object"),
    Constraint(kind="json_schema", text='{"enum": ["你好"]}'),
    Constraint(kind="choice", choices=("yes", "no")),
    Constraint(kind="regex", text="[0-9]+"),
    Constraint(kind="grammar", text='start: "a"'),
]


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_constraint_round_trip(constraint: Constraint) -> None:
    sampling = SamplingParams(constraint=constraint)
    assert wire.sampling_from_proto(wire.sampling_to_proto(sampling)) == sampling


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (llm_pb2.Constraint(), "sampling.constraint"),
        (llm_pb2.Constraint(json_schema=""), "sampling.constraint.json_schema"),
        (llm_pb2.Constraint(regex="a" * 65_537), "sampling.constraint.regex"),
        (llm_pb2.Constraint(choice=llm_pb2.Choices()), "sampling.constraint.choice"),
        (llm_pb2.Constraint(choice=llm_pb2.Choices(texts=["a", ""])), "sampling.constraint.choice[1]"),
        (llm_pb2.Constraint(choice=llm_pb2.Choices(texts=["a" * 40_000] * 2)), "sampling.constraint.choice"),
    ],
)
def test_malformed_constraint_is_refused(message: llm_pb2.Constraint, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        wire.sampling_from_proto(llm_pb2.SamplingParams(constraint=message))
    assert caught.value.field == field


def test_json_object_that_is_false_asks_for_nothing() -> None:
    message = llm_pb2.SamplingParams(constraint=llm_pb2.Constraint(json_object=False))
    assert wire.sampling_from_proto(message) == SamplingParams()


@pytest.mark.parametrize("raw_prompt", ["<s>[INST] Hi [/INST]", "", (1, 5, 2**32 - 1)])
def test_raw_prompt_round_trip(raw_prompt: str | tuple[int, ...]) -> None:
    request = generate_request(turns=(), images=(), raw_prompt=raw_prompt)
    data = wire.generate_request_to_proto(request, FINGERPRINT).SerializeToString()
    assert wire.generate_request_from_proto(llm_pb2.GenerateRequest.FromString(data)) == request


def test_raw_prompt_stands_alone() -> None:
    for message in (llm_pb2.RawPrompt(), llm_pb2.RawPrompt(token_ids=llm_pb2.TokenIds())):
        with pytest.raises(InvalidInput, match="^raw_prompt"):
            wire.raw_prompt_from_proto(message)
    for changes in ({"images": ()}, {"images": (), "turns": (), "continue_final_message": True}):
        message = wire.generate_request_to_proto(generate_request(raw_prompt="a", **changes), FINGERPRINT)
        with pytest.raises(InvalidInput, match="is set beside raw_prompt"):
            wire.generate_request_from_proto(message)


@pytest.mark.parametrize("value", [0.0, -1.0, 1.0001, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["threshold", "keep_ratio"])
def test_pruning_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(InvalidInput) as caught:
        wire.samplers_from_proto(llm_pb2.PruneParams(**{name: value}), "prune")
    assert caught.value.field == f"prune.{name}" and str(caught.value).endswith("expected (0, 1]")


def test_threshold_and_ratio_exclude_each_other() -> None:
    with pytest.raises(InvalidInput, match=r"^prune\.keep_ratio: is 0\.49 beside a threshold of 0\.85"):
        wire.samplers_from_proto(llm_pb2.PruneParams(threshold=0.85, keep_ratio=0.49))


def test_malformed_turns_are_refused() -> None:
    text = llm_pb2.PromptPart(text="hi")
    cases = [
        ([], "turns"),
        ([llm_pb2.PromptTurn(parts=[text])], "turns[0].role"),
        ([llm_pb2.PromptTurn(role=9, parts=[text])], "turns[0].role"),
        ([llm_pb2.PromptTurn(role=llm_pb2.ROLE_USER, parts=[text, llm_pb2.PromptPart()])], "turns[0].parts[1]"),
        ([llm_pb2.PromptTurn(role=llm_pb2.ROLE_USER, parts=[llm_pb2.PromptPart(image_index=2)])], "turns[0].parts[0]"),
    ]
    for turns, field in cases:
        with pytest.raises(InvalidInput) as caught:
            wire.turns_from_proto(turns, 2)
        assert caught.value.field == field


def test_request_id_and_fingerprints_are_required() -> None:
    message = wire.generate_request_to_proto(generate_request(), FINGERPRINT)
    for name in ("request_id", "model_fingerprint"):
        broken = llm_pb2.GenerateRequest()
        broken.CopyFrom(message)
        broken.ClearField(name)
        with pytest.raises(InvalidInput, match=name):
            wire.generate_request_from_proto(broken)
    message.images[1].model_fingerprint = "cd" * 32
    with pytest.raises(WrongFingerprint, match=r"images\[1\]"):
        wire.generate_request_from_proto(message)


@pytest.mark.parametrize("reason", ["stop", "length", "abort"])
def test_finished_round_trip(reason: str) -> None:
    usage = Usage(
        prompt_tokens=120,
        completion_tokens=4,
        visual_tokens_uncompressed=100,
        visual_tokens_sampled=60,
        visual_tokens_kept=20,
        prune_layer=2,
        num_layers=6,
        kv_bytes=2**33,
        kv_unpruned_bytes=2**34,
        time_to_first_token_s=0.25,
    )
    message = wire.event_to_proto(FinishedEvent(reason=reason, usage=usage))
    assert wire.event_from_proto(message) == FinishedEvent(reason=reason, usage=usage)
    # 60 - 40 * (6 - 2) / 6 of 100.
    assert message.finished.usage.converted_share_percent == pytest.approx(100 / 3)


def test_token_and_error_events_round_trip() -> None:
    token = TokenEvent(text="né", token_ids=(0, 151_936))
    assert wire.event_from_proto(wire.event_to_proto(token)) == token
    chosen, other = (
        TokenLogprob(token_id=7, logprob=-0.5, text=" n", raw_bytes=b" n"),
        TokenLogprob(token_id=0, logprob=-2.25, text="\ufffd", raw_bytes=b"\xc3"),
    )
    logprobs = (TokenLogprobs(chosen=chosen, top=(chosen, other)), TokenLogprobs(chosen=other))
    token = TokenEvent(text="né", token_ids=(7, 0), logprobs=logprobs)
    assert wire.event_from_proto(wire.event_to_proto(token)) == token
    error = wire.event_from_proto(wire.event_to_proto(TooLarge("needs 9 blocks", field="turns")))
    assert isinstance(error, FocusError)
    assert (error.code, str(error)) == (Code.RESOURCE_EXHAUSTED, "turns: needs 9 blocks")
    strange = llm_pb2.GenerateResponse(error=error_pb2.StreamError(code="NO_SUCH_CODE", message="m"))
    unknown = wire.event_from_proto(strange)
    assert isinstance(unknown, FocusError) and unknown.code is Code.INTERNAL


def test_empty_and_unspecified_events_are_refused() -> None:
    with pytest.raises(InvalidInput, match="event"):
        wire.event_from_proto(llm_pb2.GenerateResponse())
    with pytest.raises(InvalidInput, match=r"finished\.reason"):
        wire.event_from_proto(llm_pb2.GenerateResponse(finished=llm_pb2.Finished()))
