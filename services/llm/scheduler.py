"""What the next step computes: a token of every answer that runs, and as much prefill as the budget has room for.

A prompt's prefill is split by tokens and by layers. The lower layers take it in chunks, whose hidden states wait beside
the KV cache; when the last chunk is in, every visual token and every word of the instruction is there, so the selection
is that of a whole prompt; then the upper layers take the kept tokens in chunks. The budget counts one token through all
layers as 1, through some as their share. An older request's chunk always comes before a younger one's.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from services.llm.engine_config import EngineConfig
from services.llm.kv_cache import LOWER, UPPER, KVCache
from services.llm.sequence import Sequence, SequenceState


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """`count` tokens of a prefill from `start` on, in one KV cache group: indices of that group's own tokens."""

    sequence: Sequence
    start: int
    count: int


@dataclass(kw_only=True)
class Step:
    """One pass over the decoder."""

    decode: list[Sequence] = field(default_factory=list)
    lower: list[Chunk] = field(default_factory=list)
    selecting: list[Sequence] = field(default_factory=list)
    """Their lower layers are complete with this step's chunks: the next thing is to select what goes on."""
    upper: list[Chunk] = field(default_factory=list)
    budget: int = 0
    """What is left of it, in tokens times layers."""
    reserved: int = 0
    """Budget kept for upper chunks of `selecting`, whose length only the selection can tell."""

    @property
    def only_decodes(self) -> bool:
        return not (self.lower or self.selecting or self.upper)

    @property
    def sequences(self) -> list[Sequence]:
        chunks = [chunk.sequence for chunk in (*self.lower, *self.upper)]
        return list(dict.fromkeys([*self.decode, *chunks, *self.selecting]))


class Scheduler:
    """First come, first served. Pages are taken as tokens come; when none is left, the youngest sequence gives way."""

    def __init__(self, cache: KVCache, config: EngineConfig):
        assert config.max_batch_tokens is not None and config.max_running is not None, "sizes are set"
        self.cache = cache
        self.max_running = config.max_running
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # the oldest first
        self.preemptions = 0
        self._layers = [group.num_layers for group in cache.groups]
        self._budget = config.max_batch_tokens * sum(self._layers)

    def add(self, sequence: Sequence) -> None:
        assert sequence.state is SequenceState.WAITING
        self.waiting.append(sequence)

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def prefill_tokens_left(self) -> float:
        """Tokens that prefill has before it, each counted by its share of the layers. Any thread may ask."""
        left = [0, 0]
        for sequence in (*self.waiting, *self.running):  # both are copied before another thread can change them
            if sequence.in_prefill:
                for group, tokens in enumerate(sequence.prefill_left):
                    left[group] += tokens * self._layers[group]
        return sum(left) / sum(self._layers)

    def pages_wanted(self) -> int:
        """Pages that requests hold, and those that waiting ones would take for their prompts. Any thread may ask."""
        held = self.cache.num_pages - self.cache.pool.pages_to_have
        waiting = tuple(self.waiting)
        return held + sum(self.cache.pages_needed(each.num_tokens, each.num_tokens - each.removed) for each in waiting)

    def schedule(self) -> Step:
        """The next step, with pages for all that it writes but the upper chunks that `extend` adds."""
        decoding = sum(not sequence.in_prefill for sequence in self.running)
        least = self.cache.block_size * sum(self._layers)
        step = Step(budget=max(self._budget - decoding * sum(self._layers), least))
        for sequence in list(self.running):
            if sequence.state is SequenceState.RUNNING:  # not preempted by an older one just now
                self._plan(sequence, step)
        while self.waiting and len(self.running) < self.max_running and step.budget >= least and self._has_room():
            sequence = self.waiting[0]
            self.cache.open(sequence.request_id)  # it may fail, and the sequence must be in a queue then
            self.waiting.popleft()
            sequence.start()
            self.running.append(sequence)
            self._plan(sequence, step)
        assert step.sequences or not self.has_work(), "the oldest sequence can always go on"
        return step

    def extend(self, step: Step) -> None:
        """Adds first upper chunks of the sequences that have just selected. Nobody is preempted: all are under way."""
        step.budget += step.reserved
        for sequence in step.selecting:
            self._plan_upper(sequence, step, preempt=False)

    def finish(self, sequence: Sequence, *, broken: bool = False) -> None:
        """Takes a sequence out, in whatever state it is, and frees its pages. broken: its KV cache may be wrong."""
        state, sequence.state, sequence.visual_ND = sequence.state, SequenceState.FINISHED, None
        if state is SequenceState.WAITING:
            self.waiting.remove(sequence)
        elif state is SequenceState.RUNNING:
            self.running.remove(sequence)
            self.cache.free(sequence.request_id, broken=broken)

    def check_integrity(self) -> None:
        """Asserts that pages are held by the running sequences only, enough for what each holds."""
        self.cache.check_integrity({sequence.request_id for sequence in self.running})
        assert all(sequence.state is SequenceState.WAITING for sequence in self.waiting)
        for sequence in self.running:
            assert sequence.state is SequenceState.RUNNING
            for group, held in enumerate(sequence.kv_lens):
                assert held <= self.cache.capacity(sequence.request_id, group)

    def _plan(self, sequence: Sequence, step: Step) -> None:
        if not sequence.in_prefill:
            if all(self._grow(sequence, group, sequence.kv_lens[group] + 1) for group in (LOWER, UPPER)):
                step.decode.append(sequence)
        elif sequence.upper_index is None:
            self._plan_lower(sequence, step)
        else:
            self._plan_upper(sequence, step, preempt=True)

    def _plan_lower(self, sequence: Sequence, step: Step) -> None:
        request_id, held = sequence.request_id, sequence.kv_lens
        # Also what another sequence computes in this very step: layer by layer, keys are stored before they are read.
        adopted = self.cache.adopt(request_id, sequence.block_keys)
        if not sequence.preempted:  # later it finds its own blocks
            sequence.reused_tokens += adopted
        held[LOWER] += adopted
        left = sequence.prefill_len - held[LOWER]
        count = min(left, step.budget // self._layers[LOWER])
        if count < left:
            count -= count % self.cache.block_size
        if left:
            if not count or not self._grow(sequence, LOWER, held[LOWER] + count):
                return
            step.lower.append(Chunk(sequence=sequence, start=held[LOWER], count=count))
            step.budget -= count * self._layers[LOWER]
            self.cache.name(request_id, sequence.block_keys, held[LOWER] + count)
        if count == left:
            step.selecting.append(sequence)
            reserved = min(step.budget, (sequence.prefill_len - sequence.removed) * self._layers[UPPER])
            step.budget -= reserved
            step.reserved += reserved

    def _plan_upper(self, sequence: Sequence, step: Step, *, preempt: bool) -> None:
        assert sequence.upper_index is not None
        held = sequence.kv_lens[UPPER]
        count = min(len(sequence.upper_index) - held, step.budget // self._layers[UPPER])
        if count and self._grow(sequence, UPPER, held + count, preempt=preempt):
            step.upper.append(Chunk(sequence=sequence, start=held, count=count))
            step.budget -= count * self._layers[UPPER]

    def _grow(self, sequence: Sequence, group: int, tokens: int, *, preempt: bool = True) -> bool:
        """Room for `tokens` tokens, if need be at the cost of younger sequences; False: it must wait for older ones."""
        while not self.cache.can_grow(sequence.request_id, group, tokens):
            youngest = self.running[-1]
            if youngest is sequence or not preempt:
                return False
            self.running.pop()
            self.cache.free(youngest.request_id)
            youngest.preempt()
            self.waiting.appendleft(youngest)
            self.preemptions += 1
        self.cache.grow(sequence.request_id, group, tokens)
        return True

    def _has_room(self) -> bool:
        """Whether the first that waits can be prefilled with what running sequences leave, and these have a little."""
        sequence = self.waiting[0]
        spare = sum(
            self.cache.pages_missing(other.request_id, other.prefill_len, other.prefill_len - other.removed)
            if other.in_prefill
            else sum(self.cache.pages_a_block)
            for other in self.running
        )
        tokens = sequence.num_tokens
        return self.cache.can_open(sequence.block_keys, tokens, tokens - sequence.removed, spare)
