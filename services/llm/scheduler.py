"""What the next pass is: prefill of requests that fit, or decode of all that run."""

from __future__ import annotations

from collections import deque

from services.llm.kv_cache import KVCache
from services.llm.sequence import Sequence, SequenceState


class Scheduler:
    """First come, first served. A request is admitted once the KV cache can hold its worst case, so none runs out."""

    def __init__(self, cache: KVCache, *, max_batch_tokens: int, max_running: int):
        """max_batch_tokens: most prompt tokens of one prefill pass; a single longer prompt runs alone."""
        self.cache = cache
        self.max_batch_tokens = max_batch_tokens
        self.max_running = max_running
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._prefilled_last = False

    def add(self, sequence: Sequence) -> None:
        assert sequence.state is SequenceState.WAITING
        self.waiting.append(sequence)

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> tuple[list[Sequence], bool]:
        """The sequences of the next pass and whether it is a prefill; what a prefill admits holds its pages already.

        Prefill comes first, but never twice in a row while others decode: a rush of prompts slows streams, it does
        not stop them.
        """
        if not (self._prefilled_last and self.running):
            admitted = self._admit()
            if admitted:
                self._prefilled_last = True
                return admitted, True
        self._prefilled_last = False
        return list(self.running), False

    def _admit(self) -> list[Sequence]:
        admitted: list[Sequence] = []
        tokens = 0
        while self.waiting and len(self.running) < self.max_running:
            sequence = self.waiting[0]
            tokens += sequence.prompt_len
            if admitted and tokens > self.max_batch_tokens or not self.cache.can_allocate(sequence.max_kv_len):
                break
            self.waiting.popleft()
            self.cache.allocate(sequence.request_id, sequence.max_kv_len)
            sequence.state = SequenceState.RUNNING
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, in whatever state it is, and frees its pages."""
        if sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
        elif sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
            self.cache.free(sequence.request_id)
        sequence.state = SequenceState.FINISHED
        sequence.visual_ND = None

    def check_integrity(self) -> None:
        """Asserts that pages are held by the running sequences only, enough for what each holds."""
        self.cache.check_integrity({sequence.request_id for sequence in self.running})
        assert all(sequence.state is SequenceState.WAITING for sequence in self.waiting)
        for sequence in self.running:
            assert sequence.state is SequenceState.RUNNING
            for group, held in enumerate(sequence.kv_lens):
                assert held <= self.cache.capacity(sequence.request_id, group)
