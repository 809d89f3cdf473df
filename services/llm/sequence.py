"""One request on its way through the engine."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field

import torch

from services.common.types import GenerateRequest, PruneDecision
from services.llm.detokenizer import Detokenizer
from services.llm.prompt import Prompt


class SequenceState(enum.Enum):
    WAITING = "waiting"
    """Holds no KV cache."""
    RUNNING = "running"
    FINISHED = "finished"
    """Holds no KV cache any more."""


@dataclass(kw_only=True, eq=False)
class Sequence:
    """A prompt and the tokens generated so far.

    After pruning, position and KV length part ways: kept tokens keep their original positions and the answer goes on
    from the original prompt's length, while the second KV cache group holds only the kept tokens.
    """

    request: GenerateRequest
    prompt: Prompt
    visual_ND: torch.Tensor | None
    """Visual tokens of all images, in the model's dtype; dropped after prefill."""
    threshold: float
    """gamma of Eq. 9; 1.0 when this request is not pruned."""
    max_new_tokens: int
    """The request's max_tokens, clipped to the context."""
    generator: torch.Generator
    detokenizer: Detokenizer
    state: SequenceState = SequenceState.WAITING
    output_ids: list[int] = field(default_factory=list)
    kv_lens: list[int] = field(default_factory=lambda: [0, 0])
    """Tokens held in each KV cache group: layers before the prune layer, layers from it on."""
    next_position: int = 0
    """RoPE position of the next token to enter the model."""
    decision: PruneDecision | None = None
    received_at: float = field(default_factory=time.monotonic)
    first_token_at: float | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def prompt_len(self) -> int:
        return len(self.prompt.input_ids)

    @property
    def num_visual(self) -> int:
        return sum(last - first for first, last in self.prompt.visual_spans)

    @property
    def max_kv_len(self) -> int:
        """Most tokens that a KV cache group may ever hold of this sequence (the last token is never fed back)."""
        return self.prompt_len + self.max_new_tokens - 1

    @property
    def kept_prompt_len(self) -> int:
        """Prompt tokens that go on after the prune layer."""
        return self.prompt_len - (self.num_visual - len(self.decision.kept) if self.decision else 0)
