"""An answer on its way, and the whole one."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch

from focusllava.messages import Answer, ImageInfo
from focusllava.wire import AnswerState
from services.checkpoint.config import FocusLlavaConfig
from services.common import wire
from services.common.errors import InternalError
from services.common.types import CompressedVisualTokens, DecisionEvent, FinishedEvent, PruneDecision, TokenEvent
from services.llm.engine_stats import Event
from services.llm.sequence import Sequence as EngineSequence
from services.local.maps import client_maps
from services.local.request import AskedRequest
from services.text.prompt import Prompt


@dataclass(frozen=True, kw_only=True)
class LocalAnswer(Answer):
    """A whole answer, and what the text-guided sampler chose for it."""

    prompt: Prompt = field(compare=False)
    decision: PruneDecision | None = field(compare=False)
    """The engine's own choice among the prompt's visual tokens; None where nothing was pruned."""

    @property
    def kept(self) -> tuple[torch.Tensor, ...]:
        """int64, a tensor an image: ascending indices of its visual tokens that the layers from prune_layer on saw."""
        sizes = [last - first for first, last in self.prompt.visual_spans]
        kept_N = torch.ones(sum(sizes), dtype=torch.bool)
        if self.decision is not None:
            kept_N[:] = False
            kept_N[self.decision.kept] = True
        return tuple(part.nonzero().flatten() for part in kept_N.split(sizes)) if sizes else ()


class LocalStream(AnswerState):
    """Iterate for the text of an answer as it is generated.

    Every iteration advances all answers under way, so several streams are one batch. Raises FocusError, naming the
    field that is wrong, when the request's turn comes. Leaving a `with` block, `close()` or dropping the stream ends
    the request.
    """

    def __init__(
        self,
        asked: AskedRequest,
        config: FocusLlavaConfig,
        step: Callable[[], None],
        abort: Callable[[LocalStream], None],
    ):
        """step: advances every answer under way; abort: takes this request out of the engine."""
        super().__init__()
        self.request_id = asked.request.request_id
        self.ended = False
        """Nothing more will come: it is answered, has failed, or is closed."""
        self._config, self._step, self._abort = config, step, abort
        self.engine_id: str | None = None
        """The request's name in the engine, once it is there."""
        self._sequence: EngineSequence | None = None
        self._prompt: Prompt | None = None
        self._decision: PruneDecision | None = None
        self._pieces: deque[str] = deque()
        self._error: Exception | None = None
        self._received_at = time.monotonic()
        self._first_token_s = 0.0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while not self._pieces:
            if self._error is not None:
                raise self._error
            if self.ended:
                raise StopIteration
            self._step()
        return self._pieces.popleft()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the iteration and the request. Safe to call twice and after the end."""
        if not self.ended:
            self.ended = True
            self._pieces.clear()
            self._abort(self)

    def result(self) -> LocalAnswer:
        """Reads to the end. Raises FocusError."""
        for _ in self:
            pass
        if self._prompt is None:
            raise InternalError("the stream was closed before its end")
        return LocalAnswer(**vars(self.answer()), prompt=self._prompt, decision=self._decision)

    def begin(self, sequence: EngineSequence, images: Sequence[tuple[CompressedVisualTokens, bool]]) -> None:
        """Notes that the engine has the request; images: visual tokens of each, and whether they were there before."""
        self._sequence, self.engine_id = sequence, sequence.request_id
        self.images = tuple(
            ImageInfo(
                content_hash=tokens.content_hash,
                cached=cached,
                visual_tokens_uncompressed=tokens.uncompressed_tokens,
                visual_tokens_sampled=len(tokens.tokens_ND),
                notes=tokens.notes,
            )
            for tokens, cached in images
        )

    def deliver(self, event: Event) -> None:
        """Takes the request's next event."""
        if isinstance(event, Exception):
            self.fail(event)
            return
        if not self.token_ids and not isinstance(event, FinishedEvent):
            self._first_token_s = time.monotonic() - self._received_at
        if isinstance(event, DecisionEvent):
            assert self._sequence is not None
            request = self._sequence.request
            sampled = request.samplers.vision_sampler
            self.focus = client_maps(request.images, event.decision, self._config, sampled=sampled)
            return
        if isinstance(event, TokenEvent) and not event.logprobs:
            text = self.extend(event.text, event.token_ids)
        else:
            text = self.take(wire.event_to_proto(event))  # type: ignore[arg-type]  # its fields are a ChatResponse's
        if text:
            self._pieces.append(text)
        if isinstance(event, FinishedEvent):
            assert self._sequence is not None and self.usage is not None
            self.usage = dataclasses.replace(
                self.usage,
                converted_share_percent=100 * event.usage.converted_share,  # not rounded to the wire's float
                time_to_first_token_ms=1000 * self._first_token_s,
            )
            self._prompt, self._decision = self._sequence.prompt, self._sequence.decision
            self.ended, self._sequence = True, None  # which holds the visual tokens

    def fail(self, error: Exception) -> None:
        """Ends the stream with an error, after the text that has come."""
        self.ended, self._error, self._sequence = True, error, None
