"""Our two stages in one process as a peer of the benchmarks: image bytes in, tokens out, samplers as a setting says."""

from __future__ import annotations

import pathlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from benchmarks.measure import Progress, Timeline, closed_loop
from benchmarks.workload import QUESTION, jpeg
from services.common.types import (
    ChatTurn,
    CompressedVisualTokens,
    FinishedEvent,
    GenerateRequest,
    ImagePart,
    SamplerSettings,
    SamplingParams,
    TextPart,
    TokenEvent,
    Usage,
)
from services.compute.malloc import keep_freed_memory
from services.encoder.pipeline import EncoderPipeline, PreparedImage
from services.llm.engine import Engine


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The samplers that a request asks for."""

    vision: bool
    """The checkpoint's vision-guided sampler; `benchmarks/random_checkpoint.py` sets it to the paper's 49 %."""
    text_keep: float | None
    """Share of visual tokens that go on into layers k..L-1; None: text-guided sampler off."""


PAPER_VISION_KEEP = 0.49
PAPER_TEXT_KEEP = 0.75
FULL_TOKENS = 2928
"""Visual tokens of a 672 x 672 image, samplers off."""
SETTINGS = {
    "off": Setting(vision=False, text_keep=None),
    "vision": Setting(vision=True, text_keep=None),
    "text": Setting(vision=False, text_keep=PAPER_TEXT_KEEP),
    "both": Setting(vision=True, text_keep=PAPER_TEXT_KEEP),
}


def question(request_id: str, image: CompressedVisualTokens, setting: Setting, new_tokens: int) -> GenerateRequest:
    """The workload's question on one image: greedy, exactly `new_tokens` tokens."""
    ratio = setting.text_keep
    samplers = SamplerSettings(keep_ratio=ratio) if ratio else SamplerSettings(text_sampler=False)
    return GenerateRequest(
        request_id=request_id,
        turns=(ChatTurn(role="user", parts=(ImagePart(image=0), TextPart(text=QUESTION))),),
        images=(image,),
        sampling=SamplingParams(max_tokens=new_tokens, ignore_eos=True),
        samplers=samplers,
    )


def random_visual_tokens(engine: Engine, count: int, seed: int) -> CompressedVisualTokens:
    """`count` random visual tokens, as if the encoder had left so many of an image: for the LLM stage by itself."""
    generator = torch.Generator().manual_seed(seed)
    tokens_ND = torch.randn(count, engine.decoder.config.hidden_size, generator=generator)
    return CompressedVisualTokens(
        tokens_ND=(tokens_ND * engine.decoder.config.initializer_range).to(engine.decoder.dtype),
        branch_ids_M=torch.empty(0, dtype=torch.uint8),
        map_hw=(48, 48),
        uncompressed_tokens=FULL_TOKENS,
        content_hash=f"{seed:064x}",
        model_fingerprint=engine.fingerprint,
    )


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one turn of `Stages.run` measured."""

    seconds: float
    timelines: list[Timeline]
    usage: dict[int, Usage]
    peak_kv_bytes: int
    """Most bytes of KV cache pages in use at once."""


class Stages:
    """Encoder and engine on one thread that alternates between them, so that they never fight over the cores.

    Images are decoded and tiled on a thread of their own. Between two steps of the engine at most one batch of tiles is
    encoded.
    """

    def __init__(self, checkpoint: pathlib.Path, *, dtype: torch.dtype, device: str = "cpu",
                 kv_cache_bytes: int, max_tiles: int = 20, size_hw: tuple[int, int] = (672, 672)):  # fmt: skip
        if device == "cpu":
            keep_freed_memory()  # as a replica does
        self.encoder = EncoderPipeline.from_checkpoint(checkpoint, dtype=dtype, device=device)
        # Every image is new: a prefix cache could only hide work that the rivals do.
        self.engine = Engine.from_checkpoint(
            checkpoint, dtype=dtype, device=device, kv_cache_bytes=kv_cache_bytes, prefix_reuse=False
        )
        self.max_tiles, self.size_hw = max_tiles, size_hw
        self._decode = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._setting = SETTINGS["off"]
        self._new_tokens = 0
        self._decoding: deque[tuple[int, Future[PreparedImage]]] = deque()
        self._usage: dict[int, Usage] = {}
        self._peak_pages = 0

    def run(self, requests: Sequence[int], *, concurrency: int, new_tokens: int, setting: Setting) -> Turn:
        """Answers `requests`, each with an image of its own number."""
        for request in requests:
            jpeg(request, *self.size_hw)  # made before the clock starts
        self._setting, self._new_tokens = setting, new_tokens
        self._usage, self._peak_pages = {}, 0
        seconds, timelines = closed_loop(self, requests, concurrency)
        peak = self._peak_pages * self.engine.stats().kv_block_bytes
        return Turn(seconds=seconds, timelines=timelines, usage=self._usage, peak_kv_bytes=peak)

    def add(self, request: int) -> None:
        prepared = self._decode.submit(self.encoder.prepare, jpeg(request, *self.size_hw))
        self._decoding.append((request, prepared))

    def step(self) -> Iterator[Progress]:
        batch = self._next_batch()
        if batch:
            images = self.encoder.encode([image for _, image in batch], [self._setting.vision] * len(batch))
            for (request, _), image in zip(batch, images, strict=True):
                self.engine.submit(question(str(request), image, self._setting, self._new_tokens))
        events = self.engine.step()
        stats = self.engine.stats()
        self._peak_pages = max(self._peak_pages, stats.kv_blocks_used)
        for request_id, event in events:
            if isinstance(event, TokenEvent):
                yield Progress(request=int(request_id), new_tokens=len(event.token_ids))
            elif isinstance(event, FinishedEvent):
                self._usage[int(request_id)] = event.usage
                yield Progress(request=int(request_id), new_tokens=0, finished=True)

    def _next_batch(self) -> list[tuple[int, PreparedImage]]:
        """What is decoded already, in order, up to the tile budget; waits for one image when there is nothing to do."""
        batch: list[tuple[int, PreparedImage]] = []
        tiles = 0
        while self._decoding:
            request, future = self._decoding[0]
            if not future.done() and (batch or self.engine.has_work()):
                break
            image = future.result()
            tiles += len(image.tiles.pixels_T3HW)
            if batch and tiles > self.max_tiles:
                break
            batch.append((request, image))
            self._decoding.popleft()
        return batch

    def close(self) -> None:
        self._decode.shutdown()


def mean_usage(turns: Iterable[Turn]) -> dict[str, float]:
    """Means over all requests of what `Usage` accounts for."""
    usages = [usage for turn in turns for usage in turn.usage.values()]
    names = ("prompt_tokens", "visual_tokens_uncompressed", "visual_tokens_sampled", "visual_tokens_kept",
             "converted_share", "kv_bytes", "kv_bytes_unpruned")  # fmt: skip
    return {name: sum(getattr(usage, name) for usage in usages) / len(usages) for name in names}
