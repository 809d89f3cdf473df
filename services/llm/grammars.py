"""Structured output: constraints compiled once, and for each answer the tokens that its constraint allows next.

A mask of the next token depends on the tokens before it alone. So it is computed on a thread of its own while the model
computes the logits that it is for; the engine's thread waits for it only when it draws.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import llguidance
import numpy as np
import numpy.typing as npt

from services.common.errors import InvalidInput
from services.common.types import Constraint, SamplingParams
from services.llm.closing import MOST_STEPS, Closing
from services.llm.grammar_process import limits

Mask = npt.NDArray[np.uint8]

logger = logging.getLogger(__name__)

MOST_GRAMMARS = 32
"""Constraints that are kept compiled; each may grow to tens of megabytes as answers explore it."""
MOST_REFUSALS = 256
"""Constraints of which it is kept why they cannot be compiled."""
SPARE_TOKENS = 8
"""An answer that nears max_tokens goes to its constraint's end when so many are left beside it, or an eighth of all."""
_UTF8_BYTES = [byte for byte in range(0xF5) if byte not in (0xC0, 0xC1)]
MASK_THREADS = max(1, min(8, (os.cpu_count() or 1) // 2))


class Guide:
    """One answer's way through its constraint."""

    def __init__(
        self, grammars: Grammars, matcher: llguidance.LLMatcher, sampling: SamplingParams, max_new_tokens: int
    ):
        self.error = ""
        """Why no next token is known; its request must end."""
        self.closes = False
        """The answer has no more tokens left than its end takes: it goes there by the shortest way."""
        assert sampling.constraint is not None
        self.constraint = sampling.constraint
        self._grammars, self._matcher, self._sampling = grammars, matcher, sampling
        self._taken, self._most = 0, max_new_tokens
        self._way: list[int] = []
        self._longest_way, self._look_at = SPARE_TOKENS, 0
        self._mask: Mask | None = None
        self._ready: Future[None] = Future()
        self._ready.set_result(None)
        grammars.fill([self])

    def mask(self) -> Mask:
        """uint8 [4 * ceil(V / 32)]: bit t % 8 of byte t // 8 says whether token t may come next."""
        self._ready.result()
        assert self._mask is not None
        return self._mask

    def _end_waits(self) -> tuple[int, ...]:
        """Tokens that would end the answer too early."""
        early, eos = self._taken < self._sampling.min_tokens, self._grammars.eos_token_ids
        return (*(eos if early or self._sampling.ignore_eos else ()), *(self._sampling.stop_token_ids if early else ()))

    def _take(self, mask: Mask, allows_any: bool) -> None:
        """The matcher's mask; the end is left out of it while it is too early, unless nothing else is left."""
        self._mask = mask
        if not allows_any or self._matcher.is_error():
            reason = (
                self._matcher.get_error().split("\n")[0] or "the model's tokenizer cannot spell what must come next"
            )
            self.error = f"cannot be followed any further: {reason}"
            return
        if self.closes or self._must_close():
            self._mask = np.zeros_like(mask)
            token = self._way.pop(0) if self._way else self._grammars.eos_token_ids[0]
            self._mask[token // 8] = 1 << token % 8
        elif waiting := self._end_waits():
            left = mask.copy()
            for token in waiting:
                left[token // 8] &= ~(1 << token % 8) & 255
            if left.any():
                self._mask = left

    def _must_close(self) -> bool:
        """Looks for a way to the end at times, the more often the fewer tokens are left beside it."""
        if self._taken < self._look_at:
            return False
        way, left = self._grammars.closing.way(self._matcher), self._most - self._taken
        if way is None or len(way) > left:
            self._look_at = self._taken + MOST_STEPS
            return False
        self._longest_way = max(self._longest_way, len(way))
        # The next token may open something that takes as many more to close.
        spare = left - len(way) - min(self._longest_way, self._most // 8)
        self._look_at = self._taken + max(1, spare // 2)
        self.closes, self._way = spare <= 0, way
        return self.closes


class Grammars:
    """Compiles constraints for one tokenizer and keeps the last ones. Thread-safe, but for `advance`."""

    def __init__(self, tokenizer: Any, *, vocabulary: int, eos_token_ids: Sequence[int]):
        """tokenizer: a fast one of transformers; vocabulary: V, the number of logits."""
        self.eos_token_ids = tuple(token for token in eos_token_ids if token < vocabulary)
        self._hf, self._vocabulary = tokenizer, max(vocabulary, len(tokenizer))
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()  # guards what is kept; never held for long
        self._compiling = threading.RLock()  # guards the process and the tokenizer
        self._compiled: OrderedDict[Constraint, Any] = OrderedDict()
        self._refused: OrderedDict[Constraint, Any] = OrderedDict()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="llm-masks")

    def start(self) -> None:
        """Reads the tokenizer now, in the background: a large vocabulary takes seconds that a first request would wait.

        Everything works without it.
        """
        threading.Thread(target=self._started, name="llm-grammars", daemon=True).start()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token, perhaps a part of a character. Raises InvalidInput for an unknown tokenizer."""
        return self._tokens().decode_bytes([token_id])

    def compile(self, constraint: Constraint, field: str = "sampling.constraint") -> llguidance.LLMatcher:
        """The constraint at its beginning, not to be changed. May take seconds: call it on a thread that may wait.

        Raises InvalidInput: it cannot be compiled (the message says why), or takes too long.
        """
        found = self.known(constraint)
        if found is None:
            with self._compiling:
                found = self.known(constraint) or self._compile(constraint)
            with self._lock:
                kept, most = (
                    (self._refused, MOST_REFUSALS) if isinstance(found, str) else (self._compiled, MOST_GRAMMARS)
                )
                kept[constraint] = found
                while len(kept) > most:
                    kept.popitem(last=False)
        if isinstance(found, str):
            raise InvalidInput(f"cannot be compiled: {found}", field=f"{field}.{constraint.kind}")
        return found

    def guide(self, sampling: SamplingParams, max_new_tokens: int) -> Guide | None:
        """The guide of a new answer of so many tokens; None where nothing constrains it. Raises as `compile`."""
        if sampling.constraint is None:
            return None
        guide = Guide(self, self.compile(sampling.constraint).deep_copy(), sampling, max_new_tokens)
        if guide.error:
            self.forget(sampling.constraint)
            raise InvalidInput(guide.error, field=f"sampling.constraint.{sampling.constraint.kind}")
        return guide

    def forget(self, constraint: Constraint) -> None:
        """Has the next request compile it anew: what it had grown to may be the reason why an answer failed."""
        with self._lock:
            self._compiled.pop(constraint, None)

    def advance(self, taken: Sequence[tuple[Guide, int]]) -> None:
        """Each guide's answer went on by a token: its next mask is computed in the background."""
        if taken:
            ready = self._worker.submit(self._advance, taken)
            for guide, _ in taken:
                guide._ready = ready

    def _advance(self, taken: Sequence[tuple[Guide, int]]) -> None:
        try:
            self._threads.consume_token_par([(guide._matcher, token) for guide, token in taken])
            for guide, _ in taken:
                guide._taken += 1
            self.fill([guide for guide, _ in taken])
        except Exception:  # nobody else's request may fail with these
            logger.exception("the masks of %d answers could not be computed", len(taken))
            for guide, _ in taken:
                guide.error = "cannot be followed any further; see the server's log"

    def fill(self, guides: Sequence[Guide]) -> None:
        """Computes the masks of guides that no other thread uses."""
        words = -(-self._vocabulary // 32)
        masks = np.empty((len(guides), 4 * words), dtype=np.uint8)
        rows = [(guide._matcher, row) for row, guide in enumerate(guides)]
        self._threads.unsafe_compute_mask_ptr(rows, masks.ctypes.data, 4 * words, len(guides))
        any_n: np.ndarray = np.any(masks, axis=1)
        for row, guide in enumerate(guides):
            guide._take(masks[row], bool(any_n[row]))

    def close(self) -> None:
        """Ends its threads and its process."""
        self._worker.shutdown(cancel_futures=True)
        with self._compiling:
            self._end_process()

    @functools.cached_property
    def closing(self) -> Closing:
        return Closing(self._tokens(), self._vocabulary)

    @functools.cached_property
    def _threads(self) -> llguidance.LLExecutor:
        return llguidance.LLExecutor(num_threads=MASK_THREADS)

    def known(self, constraint: Constraint) -> llguidance.LLMatcher | str | None:
        """What a constraint was compiled to before, or why it cannot be; None where that is not kept."""
        with self._lock:
            for kept in (self._compiled, self._refused):
                if constraint in kept:
                    kept.move_to_end(constraint)
                    return kept[constraint]
        return None

    # The rest is called with `_compiling` held.

    def _started(self) -> None:
        with self._compiling:
            try:
                self._running_process()
                _ = self.closing
            except (InvalidInput, OSError):
                return  # the first request that needs it is told

    def _tokens(self) -> llguidance.LLTokenizer:
        with self._compiling:
            if self._tokenizer is None:
                try:
                    self._tokenizer = llguidance.LLTokenizer(
                        self._description(), n_vocab=self._vocabulary, eos_token=list(self.eos_token_ids)
                    )
                except ValueError as error:
                    raise InvalidInput(
                        f"is not possible with this model's tokenizer: {error}", field="sampling.constraint"
                    ) from None
            return self._tokenizer

    @functools.cached_property
    def _unspelt(self) -> str:
        """Why this tokenizer cannot follow a constraint: the compiler takes for granted that it can spell each byte."""
        spelt = {self._tokens().decode_bytes([token]) for token in range(self._vocabulary)}
        missing = [byte for byte in _UTF8_BYTES if bytes([byte]) not in spelt]
        if not missing:
            return ""
        return f"the model's tokenizer has no token for {len(missing)} bytes, the first of them {bytes(missing[:1])!r}"

    def _description(self) -> str:
        """tokenizer.json, with the tokens that its other files add and without padding and truncation."""
        description = json.loads(self._hf.backend_tokenizer.to_str())
        return json.dumps({**description, "padding": None, "truncation": None})

    def _compile(self, constraint: Constraint) -> llguidance.LLMatcher | str:
        """Its matcher, or why there is none."""
        tokenizer = self._tokens()
        if self._unspelt:
            return self._unspelt
        asked = {"kind": constraint.kind, "text": constraint.text, "choices": constraint.choices}
        answer = self._ask(json.dumps(asked))
        if "error" in answer:
            return answer["error"]
        matcher = llguidance.LLMatcher(tokenizer, answer["grammar"], log_level=0, limits=limits())
        return matcher.get_error() if matcher.is_error() else matcher

    def _ask(self, line: str) -> dict[str, str]:
        for _ in range(2):  # somebody may have ended the process since the last time
            process = self._running_process()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(line + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except OSError:
                answer = ""
            if answer:
                return json.loads(answer)
            self._end_process()
        raise RuntimeError("the process that compiles grammars ends at once; see the server's log")

    def _running_process(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "services.llm.grammar_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf8",
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUTF8": "1"},
            )
            about = {
                "tokenizer": self._description(),
                "vocabulary": self._vocabulary,
                "eos": list(self.eos_token_ids),
            }
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(about) + "\n")
            self._process.stdin.flush()
        return self._process

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe:
                    pipe.close()
            self._process = None
