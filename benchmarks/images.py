"""What an image's visual tokens cost on their way: from the encoder's model through the gateway to the engine's intake.

The edges of both stages, their ports and the gateway's clients and cache run in this process, with no model between
them, over gRPC on the loopback interface. Ways: "shelf", where all are on one node; "grpc", as between nodes; each with
an image that nobody has seen, and with one that the gateway knows. Processor time is of all threads together.

    python -m benchmarks.images --tokens 2928 --width 4096
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
import tempfile
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.measure import RESULTS, machine, median, print_table, take_turns, write_results
from focusllava.v1 import encoder_pb2, encoder_pb2_grpc, llm_pb2, llm_pb2_grpc
from services.common import wire
from services.common.errors import FocusError
from services.common.grpc_status import refuse
from services.common.port import SHELF_NAMES_METADATA, StagePort
from services.common.shelf import FOLDER_VARIABLE, Shelf
from services.common.telemetry import Metrics
from services.common.types import CompressedVisualTokens, GenerateRequest, ImageOptions
from services.compute.dtypes import all_finite
from services.encoder.deployment import Delivery, encode_response
from services.gateway.cache import CacheKey, VisualTokenCache
from services.gateway.deadline import Deadline
from services.gateway.replicas import Replica
from services.gateway.stages import EncoderClient, LanguageModelClient, StageAddress
from services.gateway.stores import InProcessStore
from services.llm.intake import RecentSet
from services.llm.received import Received

FINGERPRINT = "f" * 64
CACHE_BYTES = 2**29
WAYS = [f"{way}, {image}" for way in ("shelf", "grpc") for image in ("new image", "known image")]


@dataclass
class Unlimited:
    max_ongoing_requests: int = 100
    max_queued_requests: int = -1


class Encoder:
    """Stage 1 without its model: the same tokens for every image."""

    def __init__(self, tokens: CompressedVisualTokens, shelf: Shelf | None, shelf_bytes: int, dtype: torch.dtype):
        self._tokens = tokens
        self._delivery = Delivery(dtype=dtype, shelf=shelf, shelf_bytes=shelf_bytes)

    async def Encode(self, request: encoder_pb2.EncodeRequest, _: Any) -> encoder_pb2.EncodeResponse:
        tokens = dataclasses.replace(self._tokens, content_hash=request.image.decode())
        claims = tokens.content_hash if self._delivery.is_near(request.shelf) else None
        return await asyncio.to_thread(encode_response, tokens, self._delivery, claims)

    async def CheckEncoder(self, *_: Any) -> encoder_pb2.CheckEncoderResponse:
        return encoder_pb2.CheckEncoderResponse()


class LanguageModel:
    """Stage 2 without its model: reads, looks at and names the tokens as its intake does."""

    def __init__(self, shelf: Shelf | None, shelf_bytes: int):
        sizes = wire.RequestSizes(context=2**20, width=2**14)
        self._received, self._known_finite = Received(sizes, shelf, shelf_bytes), RecentSet()

    async def Generate(
        self, request: llm_pb2.GenerateRequest, context: Any
    ) -> AsyncGenerator[llm_pb2.GenerateResponse]:
        try:
            asked = await asyncio.to_thread(self._take_in, request)
        except FocusError as error:
            raise refuse(context, error) from None
        if not request.images[0].shelf_name:
            names = await asyncio.to_thread(self._received.names, asked)
            context.set_trailing_metadata([(SHELF_NAMES_METADATA, ",".join(names))])
        yield llm_pb2.GenerateResponse(finished=llm_pb2.Finished())

    def _take_in(self, message: llm_pb2.GenerateRequest) -> GenerateRequest:
        request = self._received.read(message)
        (image,) = request.images
        if image.digest not in self._known_finite:
            assert all_finite(image.values_ND(torch.bfloat16)) and image.digest is not None
            self._known_finite.add(image.digest)
        return request

    async def CheckLanguageModel(self, *_: Any) -> llm_pb2.CheckLanguageModelResponse:
        return llm_pb2.CheckLanguageModelResponse()


class One:
    """A single replica."""

    def __init__(self, place: dict[str, str], shelf: Shelf | None):
        self._replica = Replica(name="one", **place, shelf=shelf.identity if shelf else "")

    async def pick(self) -> Replica:
        return self._replica


class Way:
    """Both stages and a gateway's clients."""

    def __init__(self, tokens: CompressedVisualTokens, shelf: Shelf | None, models: Shelf | None, dtype: torch.dtype):
        """shelf: that of the encoder and the gateway; models: that of the language model; dtype: on the wire."""
        self._tokens, self._shelf, self._models, self._dtype = tokens, shelf, models, dtype
        self._stack = contextlib.AsyncExitStack()

    async def start(self) -> None:
        self._encoder = await self._port(
            Encoder(self._tokens, self._shelf, CACHE_BYTES, self._dtype),
            encoder_pb2_grpc.add_EncoderServiceServicer_to_server,
            functools.partial(EncoderClient, StageAddress(), FINGERPRINT),
        )
        self._model = await self._port(
            LanguageModel(self._models, CACHE_BYTES),
            llm_pb2_grpc.add_LanguageModelServiceServicer_to_server,
            functools.partial(LanguageModelClient, StageAddress()),
        )
        self._cache = VisualTokenCache(InProcessStore(CACHE_BYTES), Metrics("gateway"), self._shelf)

    async def _port(self, stage: object, add_to_server: Any, client: Any) -> Any:
        port = StagePort(stage, add_to_server, Unlimited)
        replicas = One(await port.start("127.0.0.1"), self._models)
        self._stack.push_async_callback(port.close, 0)
        made = client(Metrics("gateway"), replicas, self._shelf)
        self._stack.push_async_callback(made.close)
        return made

    async def ask(self, image: str) -> None:
        """image: its content hash, which stands for its file."""
        key = CacheKey(content_hash=image, model_fingerprint=FINGERPRINT, vision_sampler=False)
        tokens, _ = await self._cache.get_or_encode(
            key, lambda: self._encoder.encode(image.encode(), False, ImageOptions(), Deadline())
        )
        turn = llm_pb2.PromptTurn(role=llm_pb2.ROLE_USER, parts=[llm_pb2.PromptPart(image_index=0)])
        request = llm_pb2.GenerateRequest(request_id="r", model_fingerprint=FINGERPRINT, turns=[turn], images=[tokens])
        async for event in self._model.generate(request, Deadline(), [str(key)]):
            assert event.HasField("finished"), event
        await self._cache.flush()

    async def close(self) -> None:
        await self._stack.aclose()


def turn(runner: asyncio.Runner, way: Way, images: list[str]) -> dict[str, float]:
    """Milliseconds an image, all threads' processor time and the clock's."""

    async def all_of_them() -> None:
        for image in images:
            await way.ask(image)

    processor, clock = time.process_time(), time.perf_counter()
    runner.run(all_of_them())
    return {
        "processor_ms": 1e3 * (time.process_time() - processor) / len(images),
        "clock_ms": 1e3 * (time.perf_counter() - clock) / len(images),
    }


def _shelf(folder: pathlib.Path) -> Shelf | None:
    os.environ[FOLDER_VARIABLE] = str(folder)
    return Shelf.open()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2928, help="visual tokens of an image")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--wire-dtype", choices=("bfloat16", "int8"), default="bfloat16")
    parser.add_argument("--images", type=int, default=8, help="of one turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "images.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokens = CompressedVisualTokens(
        tokens_ND=torch.randn(options.tokens, options.width).bfloat16(),
        branch_ids_M=torch.empty(0, dtype=torch.uint8),
        map_hw=(1, 1),
        uncompressed_tokens=options.tokens,
        content_hash="0" * 64,
        model_fingerprint=FINGERPRINT,
    )
    dtype = getattr(torch, options.wire_dtype)
    megabytes = wire.data_bytes((options.tokens, options.width), dtype) / 1e6
    numbers = itertools.count()

    def fresh() -> list[str]:
        return [f"{next(numbers):064x}" for _ in range(options.images)]

    known = ["e" * 64] * options.images
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, asyncio.Runner() as runner:
        ours, theirs = (_shelf(pathlib.Path(folder) / name) for name in ("ours", "theirs"))
        ways = {"shelf": Way(tokens, ours, ours, dtype), "grpc": Way(tokens, None, theirs, dtype)}
        for way in ways.values():
            runner.run(way.start())

        def one(name: str) -> dict[str, float]:
            way, _, image = name.partition(", ")
            return turn(runner, ways[way], known if image == "known image" else fresh())

        turns = take_turns({name: functools.partial(one, name) for name in WAYS}, options.rounds)
        for way in ways.values():
            runner.run(way.close())
    print(f"\n{megabytes:.1f} MB an image, medians of {options.rounds}")
    print_table(
        ("way", "processor time, ms", "clock, ms"),
        [[name, *(f"{median(t[key] for t in mine):.1f}" for key in ("processor_ms", "clock_ms"))]
         for name, mine in turns.items()],
    )  # fmt: skip
    content = {
        "checkpoint": f"8b, {options.wire_dtype}",
        "machine": machine(range(2)),
        "megabytes": megabytes,
        "images": options.images,
        "turns": turns,
    }
    write_results("images", content, options.out)


if __name__ == "__main__":
    main()
