"""The two stages behind the gateway: what they refuse, and that together they are one model."""

from __future__ import annotations

import dataclasses

import grpc
import pytest
import torch

from focusllava import FocusClient
from focusllava.v1 import encoder_pb2, encoder_pb2_grpc, focus_pb2, focus_pb2_grpc, llm_pb2, llm_pb2_grpc
from services.common import wire
from services.common.stage_secret import SECRET_METADATA
from services.common.types import (
    GenerateRequest,
    ImageOptions,
    ImagePart,
    PromptTurn,
    SamplingParams,
    TextPart,
    TokenEvent,
)
from services.encoder.pipeline import EncoderPipeline
from services.llm.engine import Engine
from services.local.model import LocalModel
from tests.serving_client import (
    LEAKS,
    SECRET,
    chat,
    encoded,
    generated,
    ids_of,
    picture,
    question,
    stage_metadata,
    text_of,
)


def test_split_over_grpc_equals_one_process(channel, checkpoint):
    """Images, both settings and both details; the tokens are rounded to bfloat16 in both, as they are on the wire."""
    pipeline = EncoderPipeline.from_checkpoint(checkpoint[0], dtype=torch.float32)
    engine = Engine.from_checkpoint(
        checkpoint[0], dtype=torch.float32, kv_cache_bytes=2**24, max_batch_tokens=4096, max_running=4
    )
    high, low = ImageOptions(), ImageOptions(detail="low")
    for seed, size, sampler, options in (
        (11, (120, 90), True, high), (12, (40, 200), True, high), (13, (90, 90), False, high),
        (11, (120, 90), True, low), (13, (90, 90), False, low),
    ):  # fmt: skip
        image = picture(seed, size)
        tokens = pipeline.encode([pipeline.prepare(image, sampler, options)], [sampler])[0]
        engine.submit(
            GenerateRequest(
                request_id="one-process",
                turns=(PromptTurn(role="user", parts=(ImagePart(image=0), TextPart(text="What is on the card?"))),),
                images=(dataclasses.replace(tokens, tokens_ND=tokens.tokens_ND.bfloat16()),),
                sampling=SamplingParams(max_tokens=12, ignore_eos=True),
            )
        )
        alone = []
        while engine.has_work():
            alone += [event for _, event in engine.step()]
        asked = question(image, vision_sampler_off=not sampler)
        asked.turns[0].parts[0].image_options.CopyFrom(wire.image_options_to_proto(options))
        events = chat(channel, asked)
        assert text_of(events) == "".join(e.text for e in alone if isinstance(e, TokenEvent))
        assert ids_of(events) == [t for e in alone if isinstance(e, TokenEvent) for t in e.token_ids]
        served, here = events[-1].finished.usage, alone[-1].usage
        assert served.visual_tokens_kept == here.visual_tokens_kept
        assert (served.prompt_tokens, served.visual_tokens_uncompressed, served.visual_tokens_sampled) == (
            here.prompt_tokens, here.visual_tokens_uncompressed, len(tokens.tokens_ND),
        )  # fmt: skip


def test_local_model_answers_token_for_token_as_the_server(cluster, checkpoint, monkeypatch):
    """LocalModel rounds no visual tokens; here they are bfloat16, as on the wire."""
    encode = EncoderPipeline.encode
    monkeypatch.setattr(
        EncoderPipeline,
        "encode",
        lambda *asked: [dataclasses.replace(t, tokens_ND=t.tokens_ND.bfloat16()) for t in encode(*asked)],
    )
    asked = (
        {}, {"vision_sampler": False}, {"text_sampler": False}, {"keep_ratio": 0.3}, {"detail": "low"},
        {"temperature": 1.0, "top_p": 0.9, "seed": 7}, {"repetition_penalty": 1.3, "json_object": True},
    )  # fmt: skip
    with (
        FocusClient(cluster.grpc_address, timeout_s=60) as client,
        LocalModel(checkpoint[0], "cpu", "float32", kv_cache_bytes=2**24) as model,
    ):
        for number, settings in enumerate(asked):
            question = picture(60 + number, (120, 90)), "What is on the card?"
            served = client.ask(*question, max_tokens=20, **settings).result()
            local = model.ask(*question, max_tokens=20, **settings)
            assert (served.text, served.token_ids, served.finish_reason) == (
                local.text, local.token_ids, local.finish_reason,
            )  # fmt: skip
            assert served.token_ids, settings
            assert served.usage.converted_share_percent == pytest.approx(local.usage.converted_share_percent)
            same = {"time_to_first_token_ms": 0.0, "converted_share_percent": 0.0}
            assert dataclasses.replace(served.usage, **same) == dataclasses.replace(local.usage, **same)


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


@pytest.mark.parametrize("secret", ["", "0" * 64, SECRET[:-1], SECRET.upper()])
def test_no_stage_answers_who_comes_by_the_public_port_without_the_secret(channel, checkpoint, secret):
    """The port that everybody may reach leads to the stages too: it is no way past the gateway's keys and limits."""
    encoder, model = encoder_pb2_grpc.EncoderServiceStub(channel), llm_pb2_grpc.LanguageModelServiceStub(channel)
    calls = {
        "encoder": [
            lambda said: encoder.Encode(encoder_pb2.EncodeRequest(model_fingerprint=checkpoint[1]), metadata=said),
            lambda said: encoder.CheckEncoder(encoder_pb2.CheckEncoderRequest(), metadata=said),
        ],
        "llm": [
            lambda said: list(model.Generate(llm_pb2.GenerateRequest(model_fingerprint=checkpoint[1]), metadata=said)),
            lambda said: model.CheckLanguageModel(llm_pb2.CheckLanguageModelRequest(), metadata=said),
        ],
    }
    for application, methods in calls.items():
        for call in methods:
            with pytest.raises(grpc.RpcError) as caught:
                call(stage_metadata(application, secret))
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert SECRET_METADATA in caught.value.details() and not LEAKS.search(caught.value.details())


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
    nan = b"\xff\x7f" * (len(good.tokens.data) // 2)  # bfloat16's NaN
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
