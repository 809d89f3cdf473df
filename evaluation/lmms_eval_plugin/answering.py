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
from focusllava import Answer, FocusClient
from focusllava.messages import Settings
from services.common.errors import InternalError
from services.common.media import MediaLimits
from services.common.types import SamplerSettings
from services.local.model import LocalModel
from services.local.stream import LocalStream

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
    """Both stages in this process. The images of the latest questions are not encoded again."""

    def __init__(self, model: LocalModel, samplers: SamplerSettings):
        self._model, self._samplers = model, samplers

    def answer(self, batch: Sequence[Question]) -> list[Reply]:
        streams: list[LocalStream] = []
        try:
            for question in batch:
                with _named(question):
                    streams.append(self._model.stream(question.turns, **_settings(question, self._samplers)))
            replies = []
            for question, stream in zip(batch, streams, strict=True):
                with _named(question):
                    replies.append(_reply(stream.result()))
            return replies
        finally:
            for stream in streams:
                stream.close()

    def close(self) -> None:
        self._model.close()


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
            return _reply(self._client.chat(question.turns, **_settings(question, self._samplers)).result())


def _settings(question: Question, samplers: SamplerSettings) -> Settings:
    sampling = question.sampling
    return Settings(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        stop=sampling.stop,
        stop_token_ids=sampling.stop_token_ids,
        **vars(samplers),  # type: ignore[typeddict-item]  # they bear the same names
    )


def _reply(answer: Answer) -> Reply:
    if answer.finish_reason not in ("stop", "length"):
        raise InternalError(f"the answer ended with {answer.finish_reason!r}")
    usage = answer.usage
    return Reply(
        text=answer.text,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        visual_tokens_uncompressed=usage.visual_tokens_uncompressed,
        converted_visual_tokens=usage.converted_visual_tokens,
    )


@contextmanager
def _named(question: Question) -> Iterator[None]:
    """Errors carry the name of the question that has no answer for them."""
    try:
        yield
    except Exception as error:  # of memory, of a damaged image, of the connection: none is an answer
        raise RequestFailed(question.name, error) from error
