"""A batch of questions -> answers: by both stages in this process, or by a served gateway.

Both raise RequestFailed, which names the request; neither ever returns fewer answers than questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from evaluation.lmms_eval_plugin.questions import Question, RequestFailed
from focusllava import FocusClient
from focusllava.messages import Settings, Turn
from services.common.errors import InternalError
from services.common.media import MediaLimits, content_hash
from services.common.types import (
    ChatTurn,
    CompressedVisualTokens,
    FinishedEvent,
    GenerateRequest,
    ImagePart,
    SamplerSettings,
    TextPart,
    TokenEvent,
)
from services.encoder.pipeline import EncoderPipeline
from services.llm.engine import Engine
from services.llm.engine_stats import StepFailed

LOCAL_LIMITS = MediaLimits(max_bytes=256 * 2**20)
"""A picture that a task has decoded comes as PNG, several times its JPEG's size."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer and what it took."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    visual_tokens_uncompressed: int
    converted_visual_tokens: float
    """Sec. 4.4 of the paper."""


class Answering(Protocol):
    """Either way of answering."""

    def answer(self, batch: Sequence[Question]) -> list[Reply]: ...

    def close(self) -> None: ...


class InProcess:
    """Encoder pipeline and engine in this process. An image that comes again in the next batch is not encoded again."""

    def __init__(self, pipeline: EncoderPipeline, engine: Engine, samplers: SamplerSettings):
        self._pipeline, self._engine, self._samplers = pipeline, engine, samplers
        self._encoded: dict[str, CompressedVisualTokens] = {}

    def answer(self, batch: Sequence[Question]) -> list[Reply]:
        visual = self._encode(batch)
        ids = [str(number) for number in range(len(batch))]
        try:
            for request_id, question in zip(ids, batch, strict=True):
                with _named(question):
                    self._engine.submit(self._request(request_id, question, visual))
            return self._run(batch)
        except BaseException:
            for request_id in ids:
                self._engine.abort(request_id)
            raise

    def close(self) -> None:
        self._encoded.clear()

    def _encode(self, batch: Sequence[Question]) -> dict[str, CompressedVisualTokens]:
        """Visual tokens of the batch's images by content hash; they replace those of the batch before."""
        fresh = {}
        encoded: dict[str, CompressedVisualTokens] = {}
        for question in batch:
            for image in _images(question.turns):
                key = content_hash(image)
                if key in self._encoded:
                    encoded[key] = self._encoded[key]
                elif key not in fresh:
                    with _named(question):
                        fresh[key] = self._pipeline.prepare(image)
        if fresh:
            with _named(*batch):
                tokens = self._pipeline.encode(list(fresh.values()), [self._samplers.vision_sampler] * len(fresh))
            encoded |= dict(zip(fresh, tokens, strict=True))
        self._encoded = encoded
        return encoded

    def _request(
        self, request_id: str, question: Question, visual: dict[str, CompressedVisualTokens]
    ) -> GenerateRequest:
        images: list[CompressedVisualTokens] = []
        turns = []
        for turn in question.turns:
            parts: list[TextPart | ImagePart] = []
            for part in turn.parts:
                if isinstance(part, str):
                    parts.append(TextPart(text=part))
                elif isinstance(part, bytes):
                    parts.append(ImagePart(image=len(images)))
                    images.append(visual[content_hash(part)])
            turns.append(ChatTurn(role=turn.role, parts=tuple(parts)))
        return GenerateRequest(
            request_id=request_id,
            turns=tuple(turns),
            images=tuple(images),
            sampling=question.sampling,
            samplers=self._samplers,
        )

    def _run(self, batch: Sequence[Question]) -> list[Reply]:
        texts = [""] * len(batch)
        replies: dict[int, Reply] = {}
        while self._engine.has_work():
            try:
                events = self._engine.step()
            except StepFailed as error:
                names = ", ".join(batch[int(request_id)].name for request_id in error.request_ids)
                raise RequestFailed(names, error.__cause__ or error) from error
            for request_id, event in events:
                number = int(request_id)
                if isinstance(event, TokenEvent):
                    texts[number] += event.text
                    continue
                if not isinstance(event, FinishedEvent):
                    raise RequestFailed(batch[number].name, event) from event
                usage = event.usage
                replies[number] = Reply(
                    text=texts[number],
                    prompt_tokens=usage.prompt_tokens,
                    completion_tokens=usage.completion_tokens,
                    visual_tokens_uncompressed=usage.visual_tokens_uncompressed,
                    converted_visual_tokens=usage.converted_visual_tokens,
                )
        return [replies[number] for number in range(len(batch))]


class Served:
    """The public gRPC API at an address; a batch's questions are in flight together."""

    def __init__(self, address: str, samplers: SamplerSettings, *, timeout_s: float | None, token: str | None):
        self._client = FocusClient(address, timeout_s=timeout_s, token=token)
        self._samplers = samplers

    def answer(self, batch: Sequence[Question]) -> list[Reply]:
        with ThreadPoolExecutor(max_workers=max(1, len(batch))) as pool:
            waiting = [pool.submit(self._ask, question) for question in batch]
            try:
                return [reply.result() for reply in waiting]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def close(self) -> None:
        self._client.close()

    def _ask(self, question: Question) -> Reply:
        with _named(question):
            answer = self._client.chat(question.turns, **self._settings(question)).result()
            if answer.finish_reason not in ("stop", "length"):
                raise InternalError(f"the answer ended with {answer.finish_reason!r}")
        usage = answer.usage
        return Reply(
            text=answer.text,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            visual_tokens_uncompressed=usage.visual_tokens_uncompressed,
            converted_visual_tokens=usage.converted_share_percent * usage.visual_tokens_uncompressed / 100,
        )

    def _settings(self, question: Question) -> Settings:
        sampling = question.sampling
        return Settings(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            seed=sampling.seed,
            stop=sampling.stop,
            **vars(self._samplers),  # type: ignore[typeddict-item]  # they bear the same names
        )


def _images(turns: Sequence[Turn]) -> Iterator[bytes]:
    return (part for turn in turns for part in turn.parts if isinstance(part, bytes))


@contextmanager
def _named(*questions: Question) -> Iterator[None]:
    """Errors carry the names of the questions that have no answer for them."""
    try:
        yield
    except Exception as error:  # of memory, of a damaged image, of the connection: none is an answer
        raise RequestFailed(", ".join(question.name for question in questions), error) from error
