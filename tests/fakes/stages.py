"""Scripted stages behind real gRPC servers: an encoder and a language model that fail when they are told to."""

from __future__ import annotations

import asyncio
import contextlib
import io
import pathlib

import grpc
import grpc.aio
import torch
from PIL import Image

from focusllava.v1 import encoder_pb2, encoder_pb2_grpc, llm_pb2, llm_pb2_grpc
from services.checkpoint.config import FocusLlavaConfig
from services.common import wire
from services.common.telemetry import Metrics
from services.common.tracing import server_interceptors
from services.common.types import CompressedVisualTokens
from services.gateway.admission import AdmissionLimits, ImageSizes
from services.gateway.cache import CacheKey, VisualTokenCache
from services.gateway.chat import ChatService
from services.gateway.stages import EncoderClient, LanguageModelClient, StageAddress
from services.gateway.stores import InProcessStore

KEY = CacheKey(content_hash="a" * 64, model_fingerprint="b" * 64, vision_sampler=True)
DIED = "The actor died unexpectedly before finishing this task"
PROMPT_TOKENS = 7
WORDS = ["The ", "card ", "says ", "sev", "en."]
METRICS = Metrics("gateway")
CONFIG = FocusLlavaConfig.load(pathlib.Path(__file__).parents[2] / "checkpoints" / "focusllava-tiny")


def png(size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (9, 9, 9)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()


def message_for(key: CacheKey, value: float = 1.0) -> encoder_pb2.CompressedVisualTokens:
    return wire.tokens_to_proto(
        CompressedVisualTokens(
            tokens_ND=torch.full((6, 4), value),
            branch_ids_M=torch.zeros(2 if key.vision_sampler else 0, dtype=torch.uint8),
            map_hw=(4, 4),
            uncompressed_tokens=36,
            content_hash=key.content_hash,
            model_fingerprint=key.model_fingerprint,
            notes=("a note",),
        )
    )


class LanguageModel(llm_pb2_grpc.LanguageModelServiceServicer):
    """Answers WORDS. `script` holds one entry a call: None, or (tokens before it fails, status, details), and
    perhaps trailing metadata."""

    def __init__(self, *script, words=WORDS, pause_s: float = 0.0):
        self.script, self.words, self.pause_s = list(script), words, pause_s
        self.requests: list[llm_pb2.GenerateRequest] = []
        self.metadata: list[dict[str, str]] = []
        self.cancelled = asyncio.Event()
        self.checks, self.check_pause_s, self.check_failure = 0, 0.0, None

    async def Generate(self, request, context):
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.time_remaining_s = context.time_remaining()
        failure = self.script.pop(0) if self.script else None
        try:
            for number, word in enumerate(self.words):
                if failure and number == failure[0]:
                    await context.abort(*failure[1:])
                await asyncio.sleep(self.pause_s)
                wanted = [logprobs(number)] if request.sampling.HasField("logprobs") else []
                token = llm_pb2.Token(text=word, token_ids=[number], logprobs=wanted, prompt_tokens=PROMPT_TOKENS)
                yield llm_pb2.GenerateResponse(token=token)
            yield llm_pb2.GenerateResponse(
                finished=llm_pb2.Finished(
                    reason=llm_pb2.FINISH_REASON_STOP,
                    usage=llm_pb2.Usage(prompt_tokens=PROMPT_TOKENS, completion_tokens=len(self.words)),
                )
            )
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def CheckLanguageModel(self, request, context):
        self.checks += 1
        if request.model_fingerprint != KEY.model_fingerprint:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "model_fingerprint: is another")
        if self.check_failure:
            await context.abort(*self.check_failure)
        await asyncio.sleep(self.check_pause_s)
        return llm_pb2.CheckLanguageModelResponse()


class Encoder(encoder_pb2_grpc.EncoderServiceServicer):
    """Answers the visual tokens of KEY. `script` holds one entry a call: None, or (status, details)."""

    def __init__(self, *script):
        self.script, self.requests = list(script), []

    async def Encode(self, request, context):
        self.requests.append(request)
        failure = self.script.pop(0) if self.script else None
        if failure:
            await context.abort(*failure)
        return encoder_pb2.EncodeResponse(visual_tokens=message_for(KEY))

    async def CheckEncoder(self, request, context):
        return encoder_pb2.CheckEncoderResponse()


@contextlib.asynccontextmanager
async def serving(model: LanguageModel | None = None, encoder: Encoder | None = None):
    server = grpc.aio.server(interceptors=server_interceptors())
    llm_pb2_grpc.add_LanguageModelServiceServicer_to_server(model or LanguageModel(), server)
    encoder_pb2_grpc.add_EncoderServiceServicer_to_server(encoder or Encoder(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    address = StageAddress(target=f"127.0.0.1:{port}", attempts=3, backoff_s=0.01, timeout_s=20)
    clients = EncoderClient(address, KEY.model_fingerprint, METRICS), LanguageModelClient(address, METRICS)
    try:
        yield clients
    finally:
        for client in clients:
            await client.close()
        await server.stop(0)


def logprobs(number: int) -> llm_pb2.TokenLogprobs:
    return llm_pb2.TokenLogprobs(
        chosen=llm_pb2.TokenLogprob(token_id=number, logprob=-number, text=str(number), raw_bytes=b"%d" % number)
    )


def service(encoder: EncoderClient, model: LanguageModelClient) -> ChatService:
    return ChatService(
        model_fingerprint=KEY.model_fingerprint,
        config=CONFIG,
        encoder=encoder,
        language_model=model,
        cache=VisualTokenCache(InProcessStore(10**6), METRICS),
        metrics=METRICS,
        limits=AdmissionLimits(),
        image_sizes=ImageSizes(tiles=5, tile_tokens=4),
    )
