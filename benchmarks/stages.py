"""Our two stages in one process as peers of the benchmarks: image bytes in, tokens out, samplers as a setting says."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.measure import Progress, Timeline, closed_loop
from benchmarks.workload import QUESTION, jpeg
from focusllava import user
from focusllava.messages import Usage
from services.common.types import (
    CompressedVisualTokens,
    GenerateRequest,
    ImagePart,
    PromptTurn,
    SamplerSettings,
    SamplingParams,
    TextPart,
)
from services.compute.dtypes import dtype_name
from services.llm.engine import Engine
from services.llm.engine_stats import Event
from services.llm.sequence import Sequence as EngineSequence
from services.local.model import LocalModel
from services.local.stream import LocalStream


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
        turns=(PromptTurn(role="user", parts=(ImagePart(image=0), TextPart(text=QUESTION))),),
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


def events(engine: Engine, sequence: EngineSequence) -> Iterator[Event]:
    """Events of one sequence that the engine has prepared, with nothing beside it."""
    engine.enqueue(sequence)
    while engine.has_work():
        for _, event in engine.step():
            yield event


class Streams:
    """A peer of `closed_loop`: streams of one model, advanced by its steps."""

    def __init__(self, model: LocalModel, ask: Callable[[int], LocalStream]):
        """ask: opens the stream of a request's number."""
        self.model, self.ask = model, ask
        self.usage: dict[int, Usage] = {}
        self.peak_pages = 0
        """Most pages of the KV cache in use at once."""
        self._open: dict[int, tuple[LocalStream, int]] = {}

    def add(self, request: int) -> None:
        self._open[request] = self.ask(request), 0

    def step(self) -> Iterator[Progress]:
        self.model.step()
        self.peak_pages = max(self.peak_pages, self.model.engine.stats().kv_pages_used)
        for request, (stream, seen) in list(self._open.items()):
            new = len(stream.token_ids) - seen
            self._open[request] = stream, seen + new
            if stream.ended:
                self.usage[request] = stream.result().usage
                del self._open[request]
            if new or stream.ended:
                yield Progress(request=request, new_tokens=new, finished=stream.ended)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one turn of `Stages.run` measured."""

    seconds: float
    timelines: list[Timeline]
    usage: dict[int, Usage]
    peak_kv_bytes: int
    """Most bytes of KV cache pages in use at once."""


class Stages:
    """A LocalModel that answers the workload's question about images that it has never seen."""

    def __init__(self, checkpoint: pathlib.Path, *, dtype: torch.dtype, device: str = "cpu",
                 kv_cache_bytes: int, size_hw: tuple[int, int] = (672, 672)):  # fmt: skip
        # Every image is new: a prefix cache could only hide work that the rivals do.
        self.model = LocalModel(
            checkpoint,
            device,
            dtype_name(dtype),
            wait_for_images=False,
            kv_cache_bytes=kv_cache_bytes,
            max_batch_tokens=8192,
            max_running=64,
            prefix_reuse=False,
        )
        self.size_hw = size_hw

    def run(self, requests: Sequence[int], *, concurrency: int, new_tokens: int, setting: Setting) -> Turn:
        """Answers `requests`, each with an image of its own number."""

        def ask(request: int) -> LocalStream:
            return self.model.stream(
                [user(QUESTION, images=jpeg(request, *self.size_hw))],
                max_tokens=new_tokens,
                ignore_eos=True,
                vision_sampler=setting.vision,
                text_sampler=setting.text_keep is not None,
                keep_ratio=setting.text_keep,
            )

        for request in requests:
            jpeg(request, *self.size_hw)  # made before the clock starts
        peer = Streams(self.model, ask)
        seconds, timelines = closed_loop(peer, requests, concurrency)
        peak = peer.peak_pages * self.model.engine.stats().kv_page_bytes
        return Turn(seconds=seconds, timelines=timelines, usage=peer.usage, peak_kv_bytes=peak)

    def close(self) -> None:
        self.model.close()


def mean_usage(turns: Iterable[Turn]) -> dict[str, float]:
    """Means over all requests of what `Usage` accounts for."""
    usages = [usage for turn in turns for usage in turn.usage.values()]
    names = ("prompt_tokens", "visual_tokens_uncompressed", "visual_tokens_sampled", "visual_tokens_kept",
             "converted_share_percent", "kv_bytes", "kv_unpruned_bytes")  # fmt: skip
    return {name: sum(getattr(usage, name) for usage in usages) / len(usages) for name in names}
