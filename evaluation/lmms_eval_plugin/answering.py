"""A batch of questions -> answers: by both stages in this process, or by a served gateway.

Both raise RequestFailed, which names the request; neither ever returns fewer answers than questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Protocol

from evaluation.lmms_eval_plugin.questions import Question, RequestFailed
from focusllava import Answer, AnswerStream, FocusClient
from focusllava.messages import Settings
from services.common.errors import InternalError
from services.common.media import MediaLimits
from services.local.model import LocalModel
from services.local.stream import LocalStream

LOCAL_LIMITS = MediaLimits(max_bytes=256 * 2**20)
"""A picture that a task has decoded comes as PNG, several times its JPEG's size."""


class Answering(Protocol):
    """A way of answering."""

    def answer(self, batch: Sequence[Question]) -> list[Answer]: ...

    def close(self) -> None: ...


class InProcess:
    """Both stages in this process. The images of the latest questions are not encoded again."""

    def __init__(self, model: LocalModel, samplers: Settings):
        self._model, self._samplers = model, samplers

    def answer(self, batch: Sequence[Question]) -> list[Answer]:
        with ExitStack() as stack:  # an error ends the whole batch
            streams = []
            for question in batch:
                settings: Settings = {**question.settings, **self._samplers}
                with _named(question):
                    stream = self._model.stream(question.turns, **settings)
                    streams.append(stack.enter_context(stream))
            return [_answer_of(question, stream) for question, stream in zip(batch, streams, strict=True)]

    def close(self) -> None:
        self._model.close()


class Served:
    """The public gRPC API at an address; a batch's questions are in flight together."""

    def __init__(self, address: str, samplers: Settings, *, timeout_s: float | None, api_key: str | None):
        self._client = FocusClient(address, timeout_s=timeout_s, api_key=api_key)
        self._samplers = samplers

    def answer(self, batch: Sequence[Question]) -> list[Answer]:
        with ThreadPoolExecutor(max_workers=max(1, len(batch))) as pool:
            waiting = [pool.submit(self._ask, question) for question in batch]
            try:
                return [answer.result() for answer in waiting]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def close(self) -> None:
        self._client.close()

    def _ask(self, question: Question) -> Answer:
        settings: Settings = {**question.settings, **self._samplers}
        with _named(question):
            stream = self._client.chat(question.turns, **settings)
        return _answer_of(question, stream)


def _answer_of(question: Question, stream: AnswerStream | LocalStream) -> Answer:
    with _named(question):
        answer = stream.result()
        if answer.finish_reason not in ("stop", "length"):
            raise InternalError(f"the answer ended with {answer.finish_reason!r}")
    return answer


@contextmanager
def _named(question: Question) -> Iterator[None]:
    """Errors carry the name of the question that has no answer for them."""
    try:
        yield
    except Exception as error:  # of memory, of a damaged image, of the connection: none is an answer
        raise RequestFailed(question.name, error) from error
