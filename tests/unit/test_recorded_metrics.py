"""What the gateway and the encoder record of one request, against what they answer."""

from __future__ import annotations

import asyncio
import collections
import io
import types

import pytest
import torch
from PIL import Image

from focusllava.v1 import encoder_pb2, llm_pb2
from services.common import wire
from services.common.stage_secret import SECRET_METADATA, SECRET_VARIABLE
from services.common.telemetry import Metrics
from services.encoder import deployment
from services.encoder.deployment import Encoder
from services.encoder.settings import EncoderSettings
from services.gateway.admission import AdmissionLimits, ImageSizes
from services.gateway.cache import VisualTokenCache
from services.gateway.callers import Caller
from services.gateway.chat import ChatService
from services.gateway.compression import Compression
from services.gateway.stores import InProcessStore
from tests import tiny_llm
from tests.fakes.stages import KEY, message_for
from tests.serving_client import SECRET


class Recorded(Metrics):
    """Keeps what it is told: sums of counters, last values of gauges, lists of observations, by name and tags."""

    def __init__(self, stage):
        super().__init__(stage)
        self.counted: collections.Counter[str] = collections.Counter()
        self.gauges: dict[str, float] = {}
        self.observed: dict[str, list[float]] = collections.defaultdict(list)

    def count(self, name: str, amount: float = 1, **tags: str) -> None:
        super().count(name, amount, **tags)
        self.counted[":".join((name.removeprefix("focusllava_"), *tags.values()))] += amount

    def set(self, name: str, value: float, **tags: str) -> None:
        super().set(name, value, **tags)
        self.gauges[name.removeprefix("focusllava_")] = value

    def observe(self, name: str, value: float, **tags: str) -> None:
        super().observe(name, value, **tags)
        self.observed[name.removeprefix("focusllava_")].append(value)


def test_a_gateway_records_the_accounts_of_an_answer():
    recorded = Recorded("gateway")
    service = ChatService(
        model_fingerprint="f",
        config=None,
        encoder=None,
        language_model=None,
        cache=None,
        metrics=recorded,
        limits=AdmissionLimits(),
        image_sizes=ImageSizes(tiles=10, tile_tokens=64),
    )
    usage = llm_pb2.Usage(
        prompt_tokens=50,
        completion_tokens=5,
        visual_tokens_uncompressed=80,
        visual_tokens_sampled=40,
        visual_tokens_kept=10,
        converted_share_percent=25,
    )
    service._record(usage, Compression(level=2, map_share=0.4), Caller(), 2.0)
    assert (usage.compression_level, round(usage.load_map_share, 2), usage.load_threshold) == (2, 0.4, 0)
    plain = llm_pb2.Usage(prompt_tokens=3, completion_tokens=1)  # no image, no second token
    service._record(plain, Compression(), Caller(), 0.0)
    assert recorded.counted["prompt_tokens"] == 53 and recorded.counted["requests_compressed:2"] == 1
    assert recorded.counted["output_tokens:"] == 6, "nobody has a key"
    assert [recorded.counted[f"visual_tokens_{n}"] for n in ("uncompressed", "sampled", "kept")] == [80, 40, 10]
    assert recorded.observed == {
        "time_per_output_token_seconds": [0.5],
        "sampled_share_percent": [50],
        "kept_share_percent": [12.5],
        "converted_share_percent": [25],
    }
    service.report()
    assert recorded.gauges == {"requests_in_flight": 0}


async def test_a_cache_records_what_it_reads_writes_and_holds():
    recorded = Recorded("gateway")
    cache = VisualTokenCache(InProcessStore(10**6), recorded)

    async def encode() -> encoder_pb2.CompressedVisualTokens:
        return message_for(KEY)

    for _ in range(3):
        await cache.get_or_encode(KEY, encode)
        await cache.flush()
    size = len(message_for(KEY).SerializeToString())
    assert recorded.counted["cache_lookups:hit"] == 2 and recorded.counted["cache_lookups:miss"] == 1
    assert recorded.counted["cache_written_bytes"] == size and recorded.counted["cache_read_bytes"] == 2 * size
    cache.report()
    assert recorded.gauges["cache_bytes"] >= size
    await cache.close()


async def test_an_encoder_records_bytes_tiles_and_branches(monkeypatch: pytest.MonkeyPatch):
    recorded = Recorded("encoder")
    monkeypatch.setattr(
        "services.compute.replica.keep_freed_memory", lambda: None
    )  # it would last as long as this process
    monkeypatch.setattr(deployment, "Metrics", lambda stage, backend: recorded)
    monkeypatch.setattr(deployment, "set_up_logs", lambda environment: None)
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    settings = EncoderSettings(checkpoint=str(tiny_llm.checkpoint()), device="cpu", dtype="float32")
    encoder = Encoder.func_or_class(settings)  # type: ignore[attr-defined]
    encoder._reporter._task.cancel()
    buffer = io.BytesIO()
    Image.new("RGB", (60, 40), (200, 10, 10)).save(buffer, "PNG")
    request = encoder_pb2.EncodeRequest(
        image=buffer.getvalue(), model_fingerprint=encoder._pipeline.fingerprint, vision_sampler=True
    )
    call = types.SimpleNamespace(invocation_metadata=lambda: ((SECRET_METADATA, SECRET),))
    response = await encoder.Encode(request, call)
    tokens = wire.tokens_from_proto(response.visual_tokens)
    assert recorded.counted["image_bytes_taken"] == len(buffer.getvalue())
    assert recorded.counted["visual_token_bytes_sent"] == len(response.visual_tokens.tokens.data) > 0
    branches = torch.bincount(tokens.branch_ids_M.long()).tolist()
    assert [recorded.counted[f"regions:{branch}"] for branch in range(len(branches))] == branches
    assert sum(branches) == len(tokens.branch_ids_M) > 0
    assert [recorded.counted["encoded_tiles"]] == recorded.observed["tiles_per_batch"]
    encoder._report()
    assert set(encoder.record_autoscaling_stats()) <= {f"focusllava_{name}" for name in recorded.gauges}
    assert recorded.gauges == {
        "encoder_tiles": 0, "encoder_waiting_images": 0, "encoder_waiting_tiles": 0, "encoder_calls": 0
    }  # fmt: skip
    await asyncio.wait_for(encoder._batcher.close(), 10)
