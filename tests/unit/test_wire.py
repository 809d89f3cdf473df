"""The wire: everything survives the round trip, and everything malformed is refused by name."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from focusllava.v1 import encoder_pb2, error_pb2, llm_pb2, tensor_pb2
from services.common import wire
from services.common.errors import Code, FocusError, InvalidInput, TooLarge, WrongFingerprint
from services.common.types import (
    ChatTurn,
    CompressedVisualTokens,
    FinishedEvent,
    GenerateRequest,
    ImagePart,
    PruneParams,
    SamplingParams,
    TextPart,
    TokenEvent,
    Usage,
)

FINGERPRINT = "ab" * 32


def visual_tokens(dtype: torch.dtype = torch.bfloat16, **changes: object) -> CompressedVisualTokens:
    tokens = CompressedVisualTokens(
        tokens_ND=torch.randn(11, 6, generator=torch.Generator().manual_seed(0)).to(dtype),
        branch_ids_M=torch.tensor([0, 2, 1], dtype=torch.uint8),
        map_hw=(4, 9),
        uncompressed_tokens=56,
        content_hash="0f" * 32,
        model_fingerprint=FINGERPRINT,
        notes=("animated image: first of 12 frames used", "ü"),
    )
    return dataclasses.replace(tokens, **changes)


def generate_request(**changes: object) -> GenerateRequest:
    request = GenerateRequest(
        request_id="r-1",
        turns=(
            ChatTurn(role="system", parts=(TextPart(text="Be brief."),)),
            ChatTurn(role="user", parts=(ImagePart(image=0), TextPart(text="What? 你好"))),
            ChatTurn(role="assistant", parts=(TextPart(text=""),)),
            ChatTurn(role="user", parts=(ImagePart(image=1), TextPart(text="And this?"))),
        ),
        images=(visual_tokens(), visual_tokens(branch_ids_M=torch.empty(0, dtype=torch.uint8), notes=())),
        sampling=SamplingParams(
            max_tokens=7, temperature=0.7, top_p=0.9, seed=2**64 - 1, stop=("a", "\n"), ignore_eos=True
        ),
        prune=PruneParams(threshold=0.85),
    )
    return dataclasses.replace(request, **changes)


def same_tokens(left: CompressedVisualTokens, right: CompressedVisualTokens) -> bool:
    tensors = ("tokens_ND", "branch_ids_M")
    rest = [f.name for f in dataclasses.fields(left) if f.name not in tensors]
    return (
        all(getattr(left, n).dtype == getattr(right, n).dtype for n in tensors)
        and all(torch.equal(getattr(left, n), getattr(right, n)) for n in tensors)
        and all(getattr(left, n) == getattr(right, n) for n in rest)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 1, 3, 4)])
def test_tensor_round_trip_is_exact(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.rand(shape) * 200).to(dtype)
    message = tensor_pb2.Tensor.FromString(wire.tensor_to_proto(tensor).SerializeToString())
    back = wire.tensor_from_proto(message)
    assert back.dtype == dtype and torch.equal(back, tensor)
    back.zero_()  # the result is its own memory
    assert torch.equal(wire.tensor_from_proto(message), tensor)


def test_a_view_is_sent_in_row_major_order() -> None:
    tensor = torch.arange(12, dtype=torch.float32).view(3, 4).T[1:]
    assert not tensor.is_contiguous()
    assert torch.equal(wire.tensor_from_proto(wire.tensor_to_proto(tensor)), tensor)


def test_bytes_are_little_endian_bfloat16() -> None:
    message = wire.tensor_to_proto(torch.tensor([1.0, -2.0], dtype=torch.bfloat16))
    assert message.data == bytes([0x80, 0x3F, 0x00, 0xC0])


def tensor_message(**changes: object) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(
        **{"data_type": tensor_pb2.DATA_TYPE_FLOAT32, "shape": [2, 3], "data": bytes(24), **changes}
    )


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"data_type": 0}, "t.data_type"),
        ({"data_type": 99}, "t.data_type"),
        ({"shape": []}, "t.shape"),
        ({"shape": [1] * 9, "data": bytes(4)}, "t.shape"),
        ({"shape": [2, -3]}, "t.shape"),
        ({"shape": [-2, -3]}, "t.shape"),
        ({"shape": [0, 3], "data": b""}, "t.shape"),
        ({"shape": [2**62, 2**62]}, "t.data"),
        # 2**62 * 4 * 4 bytes is 0 modulo 2**64.
        ({"shape": [2**62, 4], "data": b""}, "t.data"),
        ({"data": bytes(23)}, "t.data"),
        ({"data": bytes(25)}, "t.data"),
        ({"data": bytes(12)}, "t.data"),
        ({"data_type": tensor_pb2.DATA_TYPE_BFLOAT16}, "t.data"),
    ],
)
def test_malformed_tensor_is_refused_by_field(changes: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        wire.tensor_from_proto(tensor_message(**changes), "t")
    assert caught.value.field == field


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_is_refused(dtype: torch.dtype, bad: float) -> None:
    tensor = torch.zeros(64, 33, dtype=dtype)
    tensor[63, 31] = bad
    with pytest.raises(InvalidInput, match="NaN or infinity"):
        wire.tensor_from_proto(wire.tensor_to_proto(tensor))
    wire.tensor_from_proto(wire.tensor_to_proto(torch.full((8,), torch.finfo(dtype).max, dtype=dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_visual_tokens_round_trip(dtype: torch.dtype) -> None:
    tokens = visual_tokens(dtype)
    data = wire.tokens_to_proto(tokens).SerializeToString()
    assert same_tokens(wire.tokens_from_proto(encoder_pb2.CompressedVisualTokens.FromString(data)), tokens)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", wire.tensor_to_proto(torch.zeros(3, 4, 5))),
        ("tokens", wire.tensor_to_proto(torch.zeros(3, 4, dtype=torch.uint8))),
        ("uncompressed_tokens", 39),
        ("uncompressed_tokens", 0),
        ("branch_ids", bytes(37)),
        ("content_hash", "0f" * 31),
        ("content_hash", "zz" * 32),
        ("model_fingerprint", ""),
    ],
)
def test_contradicting_visual_tokens_are_refused(name: str, value: object) -> None:
    message = wire.tokens_to_proto(visual_tokens())
    if name == "tokens":
        message.tokens.CopyFrom(value)
    else:
        setattr(message, name, value)
    with pytest.raises(InvalidInput) as caught:
        wire.tokens_from_proto(message, "images[1]")
    assert caught.value.field == f"images[1].{name}"


def test_missing_tensor_is_refused() -> None:
    with pytest.raises(InvalidInput, match="visual_tokens.tokens.data_type"):
        wire.tokens_from_proto(encoder_pb2.CompressedVisualTokens())


def test_generate_request_round_trip() -> None:
    request = generate_request()
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
    assert back.sampling == SamplingParams() and back.prune == PruneParams()


@pytest.mark.parametrize("prune", [PruneParams(enabled=False), PruneParams(threshold=1.0), PruneParams()])
def test_prune_round_trip(prune: PruneParams) -> None:
    assert wire.prune_from_proto(wire.prune_to_proto(prune)) == prune


def test_zero_and_unset_differ() -> None:
    assert wire.sampling_from_proto(wire.sampling_to_proto(SamplingParams(seed=0))).seed == 0
    assert wire.sampling_from_proto(wire.sampling_to_proto(SamplingParams())).seed is None


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
        ("stop", ["x"] * 9),
        ("stop", ["x", ""]),
    ],
)
def test_sampling_out_of_range_is_refused(name: str, value: object) -> None:
    with pytest.raises(InvalidInput) as caught:
        wire.sampling_from_proto(llm_pb2.SamplingParams(**{name: value}))
    assert caught.value.field.removesuffix("[1]") == f"sampling.{name}"


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.0001, float("nan"), float("inf")])
def test_threshold_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(InvalidInput, match=r"prune\.threshold"):
        wire.prune_from_proto(llm_pb2.PruneParams(threshold=threshold))


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
        kv_bytes_unpruned=2**34,
        time_to_first_token_s=0.25,
    )
    message = wire.event_to_proto(FinishedEvent(reason=reason, usage=usage))
    assert wire.event_from_proto(message) == FinishedEvent(reason=reason, usage=usage)
    # 60 - 40 * (6 - 2) / 6 of 100.
    assert message.finished.usage.converted_share_percent == pytest.approx(100 / 3)


def test_token_and_error_events_round_trip() -> None:
    token = TokenEvent(text="né", token_ids=(0, 151_936))
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
