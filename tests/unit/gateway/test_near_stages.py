"""Visual tokens between stages of one node and of several: named where both see one shelf, sent where they do not."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib

import pytest
import torch

from focusllava.v1 import encoder_pb2, encoder_pb2_grpc, llm_pb2, llm_pb2_grpc
from services.common import wire
from services.common.errors import FocusError, InternalError
from services.common.grpc_status import refuse
from services.common.port import SHELF_NAMES_METADATA, StagePort
from services.common.shelf import FOLDER_VARIABLE, Shelf
from services.common.types import CompressedVisualTokens, ImageOptions
from services.encoder.deployment import Delivery, encode_response
from services.gateway.cache import VisualTokenCache, verified
from services.gateway.deadline import Deadline
from services.gateway.replicas import Replica
from services.gateway.stages import EncoderClient, LanguageModelClient, StageAddress
from services.gateway.stores import InProcessStore
from services.llm.prefix import image_digest
from services.llm.received import Received
from tests.fakes.stages import KEY, METRICS
from tests.unit.gateway.test_replicas import Known, Limits

TIMEOUT_S = 30
TOKENS = torch.arange(24, dtype=torch.bfloat16).view(6, 4)


class Encoder:
    """Encodes every image to TOKENS."""

    def __init__(self, shelf: Shelf | None):
        self.delivery = Delivery(dtype=torch.bfloat16, shelf=shelf, shelf_bytes=2**20)
        self.calls = 0

    async def Encode(self, request, context):
        self.calls += 1
        tokens = CompressedVisualTokens(
            tokens_ND=TOKENS,
            branch_ids_M=torch.zeros(2, dtype=torch.uint8),
            map_hw=(4, 4),
            uncompressed_tokens=36,
            content_hash=KEY.content_hash,
            model_fingerprint=KEY.model_fingerprint,
        )
        near = request.image if self.delivery.is_near(request.shelf) else None
        return encode_response(tokens, self.delivery, near)

    async def CheckEncoder(self, request, context):
        return encoder_pb2.CheckEncoderResponse()


class LanguageModel:
    """Reads a request as the stage does; remembers whether its tokens were named."""

    def __init__(self, shelf: Shelf | None):
        self.received, self.named = Received(wire.RequestSizes(context=100, width=4), shelf, 2**20), []

    async def Generate(self, request, context):
        self.named.append(bool(request.images[0].shelf_name))
        try:
            asked = self.received.read(request)
        except FocusError as error:
            raise refuse(context, error) from None
        assert torch.equal(asked.images[0].tokens_ND, TOKENS) and asked.images[0].digest
        if not self.named[-1]:
            context.set_trailing_metadata([(SHELF_NAMES_METADATA, ",".join(self.received.names(asked)))])
        yield llm_pb2.GenerateResponse(finished=llm_pb2.Finished())

    async def CheckLanguageModel(self, request, context):
        return llm_pb2.CheckLanguageModelResponse()


@contextlib.asynccontextmanager
async def stages(ours: Shelf | None, encoders: Shelf | None, models: Shelf | None, claimed: str | None = None):
    """Both stages and their clients, each with the shelf that it sees. claimed: what the model's replica says of it."""
    encoder, model = Encoder(encoders), LanguageModel(models)
    async with asyncio.timeout(TIMEOUT_S), contextlib.AsyncExitStack() as stack:
        made = []
        for stage, add, client, shelf in (
            (encoder, encoder_pb2_grpc.add_EncoderServiceServicer_to_server, EncoderClient, ""),
            (model, llm_pb2_grpc.add_LanguageModelServiceServicer_to_server, LanguageModelClient,
             (models.identity if models else "") if claimed is None else claimed),
        ):  # fmt: skip
            port = StagePort(stage, add, Limits)
            known = Known(Replica(name="a", **await port.start("127.0.0.1"), shelf=shelf))
            stack.push_async_callback(port.close, 0)
            first = (KEY.model_fingerprint,) if client is EncoderClient else ()
            made.append(client(StageAddress(attempts=2, backoff_s=0.01), *first, METRICS, known, ours))
            stack.push_async_callback(made[-1].close)
        yield encoder, model, *made


@pytest.fixture
def shelf(tmp_path, monkeypatch) -> Shelf:
    return shelf_in(tmp_path / "a", monkeypatch)


def shelf_in(folder: pathlib.Path, monkeypatch) -> Shelf:
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    return Shelf.open()


async def encoded(client: EncoderClient) -> encoder_pb2.CompressedVisualTokens:
    return await client.encode(b"image", True, ImageOptions(), Deadline())


async def ask(client: LanguageModelClient, tokens: encoder_pb2.CompressedVisualTokens) -> None:
    turn = llm_pb2.PromptTurn(role=llm_pb2.ROLE_USER, parts=[llm_pb2.PromptPart(image_index=0)])
    request = llm_pb2.GenerateRequest(
        request_id="r", model_fingerprint=KEY.model_fingerprint, turns=[turn], images=[tokens]
    )
    assert [event.WhichOneof("event") async for event in client.generate(request, Deadline(), [str(KEY)])] == [
        "finished"
    ]


async def test_on_one_node_tokens_are_named_and_never_sent(shelf):
    async with stages(shelf, shelf, shelf) as (_, model, encoder_client, model_client):
        tokens = await encoded(encoder_client)
        assert tokens.shelf_name and not tokens.tokens.data and list(tokens.tokens.shape) == [6, 4]
        await ask(model_client, tokens)
        assert model.named == [True]


async def test_an_encoder_of_another_node_sends_them(shelf, tmp_path, monkeypatch):
    async with stages(shelf, shelf_in(tmp_path / "b", monkeypatch), shelf) as (_, model, encoder_client, model_client):
        tokens = await encoded(encoder_client)
        assert not tokens.shelf_name and tokens.tokens.data
        await ask(model_client, tokens)
        assert model.named == [False]


async def test_a_model_of_another_node_is_sent_them(shelf, tmp_path, monkeypatch):
    async with stages(shelf, shelf, shelf_in(tmp_path / "b", monkeypatch)) as (_, model, encoder_client, model_client):
        await ask(model_client, await encoded(encoder_client))
        assert model.named == [False]


async def test_a_model_that_does_not_find_them_is_sent_them(shelf, tmp_path, monkeypatch):
    """They may have left the shelf while the request waited: the gateway holds what it named."""
    other = shelf_in(tmp_path / "b", monkeypatch)
    async with stages(shelf, shelf, other, shelf.identity) as (_, model, encoder_client, model_client):
        await ask(model_client, await encoded(encoder_client))
        assert model.named == [True, False]


async def test_without_a_shelf_all_is_sent():
    async with stages(None, None, None) as (_, model, encoder_client, model_client):
        for _ in range(2):
            await ask(model_client, await encoded(encoder_client))
        assert model.named == [False, False]


@pytest.mark.parametrize("gateway_has_one", [True, False])
async def test_another_node_is_sent_tokens_once_and_again_when_they_are_gone_there(
    shelf, tmp_path, monkeypatch, gateway_has_one
):
    ours, other = shelf if gateway_has_one else None, shelf_in(tmp_path / "b", monkeypatch)
    async with stages(ours, ours, other) as (_, model, encoder_client, model_client):
        for _ in range(3):
            await ask(model_client, await encoded(encoder_client))
        assert model.named == [False, True, True]
        for file in other._folder.iterdir():
            file.unlink()
        for _ in range(2):
            await ask(model_client, await encoded(encoder_client))
        assert model.named == [False, True, True, True, False, True]


async def test_nobody_finds_tokens_under_a_name_that_is_not_their_digest(shelf):
    """A stage names what it was sent by its digest, so that a caller cannot put other tokens in their place."""
    async with stages(None, None, shelf) as (_, model, encoder_client, model_client):
        tokens = await encoded(encoder_client)
        await ask(model_client, tokens)
        (file,) = (file for file in shelf._folder.iterdir() if file.name != "identity")
        assert file.name == image_digest(wire.tokens_from_proto(tokens)).hex()


async def test_tokens_that_are_gone_before_the_gateway_looks_are_encoded_again_and_sent(shelf, monkeypatch):
    async with stages(shelf, shelf, shelf) as (encoder, model, encoder_client, model_client):
        monkeypatch.setattr(shelf, "get", lambda name: None)
        tokens = await encoded(encoder_client)
        assert encoder.calls == 2 and tokens.tokens.data and not tokens.shelf_name


async def test_tokens_that_are_gone_before_the_model_is_asked_are_an_error_that_says_so(shelf):
    async with stages(shelf, shelf, None) as (_, model, encoder_client, model_client):
        tokens = await encoded(encoder_client)
        (shelf._folder / tokens.shelf_name).unlink()
        with pytest.raises(InternalError, match="an image's visual tokens are gone; try again"):
            await ask(model_client, tokens)


async def test_the_gateways_cache_holds_a_name_and_misses_where_nothing_lies_under_it(shelf):
    async with stages(shelf, shelf, shelf) as (encoder, _, encoder_client, model_client):
        store = InProcessStore(10**6)
        cache = VisualTokenCache(store, METRICS, shelf)
        for cached in (False, True):
            tokens, found = await cache.get_or_encode(KEY, lambda: encoded(encoder_client))
            await cache.flush()
            assert found is cached and tokens.shelf_name and store.held_bytes < 1000
        (shelf._folder / tokens.shelf_name).unlink()
        again, found = await cache.get_or_encode(KEY, lambda: encoded(encoder_client))
        assert not found and encoder.calls == 2
        await ask(model_client, again)


async def test_a_store_that_other_nodes_read_has_the_tokens_themselves(shelf):
    class Shared(InProcessStore):
        is_shared = True

    async with stages(shelf, shelf, shelf) as (_, _, encoder_client, _):
        store = Shared(10**6)
        cache = VisualTokenCache(store, METRICS, shelf)
        await cache.get_or_encode(KEY, lambda: encoded(encoder_client))
        await cache.flush()
    found = verified(await store.get(str(KEY)), KEY)
    assert found is not None and found.tokens.data and not found.shelf_name
