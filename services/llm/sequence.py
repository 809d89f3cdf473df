"""One request on its way through the engine."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field

import torch

from services.common.types import GenerateRequest, PruneDecision, SamplerSettings
from services.grammar.guide import Guide
from services.sampler.text_guided import sure_to_leave
from services.text.detokenizer import Detokenizer
from services.text.prompt import Prompt


class SequenceState(enum.Enum):
    WAITING = "waiting"
    """Holds no KV cache; new, or preempted."""
    RUNNING = "running"
    FINISHED = "finished"
    """Holds no KV cache any more."""


@dataclass(kw_only=True, eq=False)
class Sequence:
    """A prompt and the tokens generated so far.

    After pruning, position and KV length part ways: kept tokens keep their original positions and the answer goes on
    from the original prompt's length, while the upper KV cache group holds only the kept tokens.
    """

    request: GenerateRequest
    prompt: Prompt
    visual_ND: torch.Tensor | None
    """Visual tokens of all images, in the model's dtype; kept to the end, for preemption recomputes."""
    pruning: SamplerSettings | None
    """How the text-guided sampler chooses, with one of threshold and keep_ratio set; None when every token goes on."""
    max_new_tokens: int
    """The request's max_tokens, clipped to the context."""
    generator: torch.Generator
    detokenizer: Detokenizer
    guide: Guide | None = None
    """The sequence's way through the request's constraint."""
    block_keys: tuple[bytes, ...] = ()
    """One a full block of the prompt (prefix.py)."""
    state: SequenceState = SequenceState.WAITING
    output_ids: list[int] = field(default_factory=list)
    kv_lens: list[int] = field(default_factory=lambda: [0, 0])
    """Tokens held in each KV cache group: layers before the prune layer, layers from it on."""
    prefill_len: int = 0
    """Tokens that prefill brings into the lower group: the prompt, and after a preemption the answer so far."""
    in_prefill: bool = True
    upper_index: torch.Tensor | None = None
    """int64 [K], CPU: those of the prefill_len tokens that the layers above see; None until they are selected."""
    decision: PruneDecision | None = None
    reused_tokens: int = 0
    """Prompt tokens whose lower layers an earlier request had computed already."""
    preempted: bool = False
    """Whether it was preempted so far."""
    received_at: float = field(default_factory=time.monotonic)
    first_token_at: float | None = None
    input_ids_S: torch.Tensor = field(init=False)
    """int64 [prompt], CPU: token ids, 0 in place of visual tokens (a placeholder's id may lie outside the table)."""
    visual_N: torch.Tensor = field(init=False)
    """int64 [N], CPU: positions of the visual tokens."""

    def __post_init__(self) -> None:
        self.visual_N = self.prompt.visual_positions()
        self.input_ids_S = torch.tensor(self.prompt.input_ids).index_fill(0, self.visual_N, 0)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def prompt_len(self) -> int:
        return len(self.prompt.input_ids)

    @property
    def num_visual(self) -> int:
        return len(self.visual_N)

    @property
    def num_tokens(self) -> int:
        return self.prompt_len + len(self.output_ids)

    @property
    def removed(self) -> int:
        """Visual tokens that do not go on after the prune layer: so many are known to be so far."""
        if self.decision is not None:
            return self.num_visual - len(self.decision.kept)
        return sure_to_leave(self.num_visual, self.pruning) if self.pruning else 0

    @property
    def prefill_left(self) -> tuple[int, int]:
        """Tokens that prefill still brings into each KV cache group, as far as is known."""
        tokens = self.prefill_len if self.state is SequenceState.RUNNING else self.num_tokens
        index = self.upper_index  # another thread may ask
        upper = tokens - self.removed if index is None else len(index)
        return max(tokens - self.kv_lens[0], 0), max(upper - self.kv_lens[1], 0)

    @property
    def max_kv_lens(self) -> tuple[int, int]:
        """Most tokens that each KV cache group may ever hold of this sequence (the last token is never fed back)."""
        most = self.prompt_len + self.max_new_tokens - 1
        return most, most - self.removed

    def tokens(self, start: int, end: int) -> torch.Tensor:
        """int64 [end - start], CPU: ids of the prompt and the answer so far, visual tokens as 0."""
        outputs = self.output_ids[max(start - self.prompt_len, 0) : max(end - self.prompt_len, 0)]
        prompt = self.input_ids_S[start:end]
        return torch.cat([prompt, torch.tensor(outputs)]) if outputs else prompt

    def ends_at(self, token: int, eos_token_ids: frozenset[int]) -> bool:
        """Whether the answer ends with this token. A guide lets an end-of-sequence token come only where it must."""
        sampling = self.request.sampling
        if token in eos_token_ids:
            return self.guide is not None or not sampling.ignore_eos
        return token in sampling.stop_token_ids

    def forbidden_ids(self, eos_token_ids: frozenset[int]) -> tuple[int, ...]:
        """Tokens that would end the answer too early. A guide leaves them out of its mask itself."""
        sampling = self.request.sampling
        if self.guide is not None or len(self.output_ids) >= sampling.min_tokens:
            return ()
        return (*(() if sampling.ignore_eos else eos_token_ids), *sampling.stop_token_ids)

    def start(self) -> None:
        """Admitted: everything known so far is to be prefilled."""
        self.state = SequenceState.RUNNING
        self.prefill_len = self.num_tokens

    def preempt(self) -> None:
        """Its KV cache is gone; what was decided and generated stays."""
        self.state, self.preempted = SequenceState.WAITING, True
        self.kv_lens, self.in_prefill, self.upper_index = [0, 0], True, None

    def select(self) -> None:
        """Says which tokens go on to the upper layers, the decision being made (or not needed)."""
        goes_on = torch.ones(self.prefill_len, dtype=torch.bool)
        if self.decision is not None:
            goes_on[self.visual_N] = False
            goes_on[self.visual_N[self.decision.kept]] = True
        self.upper_index = goes_on.nonzero().squeeze(1)
