"""Structured output: constraints compiled once, and for each batch the tokens that its answers' constraints allow next.

The engine's thread computes the masks of all its answers at once, after it has launched the model's pass: a GPU carries
that out meanwhile. A thread of their own would cost a processor more than the masks do: it takes Python's lock from the
engine and a core from the model.

Legend: n answers, r those of them whose mask a matcher computes, V vocabulary, W = ceil(V / 32) words.
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
from typing import Any

import llguidance
import numpy as np
import numpy.typing as npt

from services.common.errors import InvalidInput
from services.common.logs import LOGGER
from services.common.types import Constraint, SamplingParams
from services.grammar.closing import Closing
from services.grammar.guide import Guide, Start
from services.grammar.process import limits

logger = logging.getLogger(LOGGER)

MOST_GRAMMARS = 32
"""Constraints that are kept compiled; each may grow to tens of megabytes as answers explore it."""
MOST_REFUSALS = 256
"""Constraints of which it is kept why they cannot be compiled."""
_UTF8_BYTES = [byte for byte in range(0xF5) if byte not in (0xC0, 0xC1)]
MASK_THREADS = max(1, min(8, (os.cpu_count() or 1) // 2))
SHARED_FROM = 1 << 20
"""Bits of masks from which threads share them: fewer cost less than waking threads."""


class Grammars:
    """Compiles constraints for one tokenizer and keeps the last ones. Thread-safe, but for each guide."""

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

    def start(self) -> None:
        """Reads the tokenizer now, in the background: a large vocabulary takes seconds that a first request would wait.

        Everything works without it.
        """
        threading.Thread(target=self._started, name="llm-grammars", daemon=True).start()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token, perhaps a part of a character. Raises InvalidInput for an unknown tokenizer."""
        return self._tokens().decode_bytes([token_id])

    def compile(self, constraint: Constraint, field: str = "sampling.constraint") -> Start:
        """The constraint at its beginning. May take seconds: call it on a thread that may wait.

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
        start = self.compile(sampling.constraint)
        guide = Guide(start, sampling, max_new_tokens, self.eos_token_ids, self.closing)
        self.masks([guide])
        if guide.error:
            self.forget(sampling.constraint)
            raise InvalidInput(guide.error, field=f"sampling.constraint.{sampling.constraint.kind}")
        return guide

    def forget(self, constraint: Constraint) -> None:
        """Has the next request compile it anew: what it had grown to may be the reason why an answer failed."""
        with self._lock:
            self._compiled.pop(constraint, None)

    def masks(self, guides: Sequence[Guide]) -> npt.NDArray[np.uint32]:
        """What each answer may go on with: uint32 [n, W], bit t % 32 of word t // 32 for token t.

        A guide whose `error` it sets has nothing to go on with."""
        masks_nW = np.zeros((len(guides), -(-self._vocabulary // 32)), dtype=np.uint32)
        try:
            rows: list[int] = []  # those whose matcher computes a mask
            for row, guide in enumerate(guides):
                token = guide.next_forced()
                if token is None:
                    rows.append(row)
                else:
                    masks_nW[row, token // 32] = 1 << token % 32
            self._fill([(guides[row].matcher, row) for row in rows], masks_nW)
            any_r: npt.NDArray[np.bool_] = np.any(masks_nW[rows], axis=1)
            for row, allows_any in zip(rows, any_r.tolist(), strict=True):
                guide = guides[row]
                if allows_any and not guide.matcher.is_error():
                    guide.restrict(masks_nW[row])
                else:
                    reason = guide.matcher.get_error().split("\n")[0]
                    reason = reason or "the model's tokenizer cannot spell what must come next"
                    guide.error = f"cannot be followed any further: {reason}"
        except Exception:  # nobody else's request may fail with these
            logger.exception("the masks of %d answers could not be computed", len(guides))
            for guide in guides:
                guide.error = "cannot be followed any further; see the server's log"
        return masks_nW

    def _fill(self, rows: list[tuple[llguidance.LLMatcher, int]], masks_nW: npt.NDArray[np.uint32]) -> None:
        """Each of these matchers' own mask, into its row."""
        first, size = masks_nW.ctypes.data, masks_nW.strides[0]
        if MASK_THREADS > 1 and len(rows) > 1 and 8 * size * len(rows) >= SHARED_FROM:
            self._threads.unsafe_compute_mask_ptr(rows, first, size, len(masks_nW))
        else:
            for matcher, row in rows:
                matcher.unsafe_compute_mask_ptr(first + row * size, size)

    def close(self) -> None:
        """Ends its process."""
        with self._compiling:
            self._end_process()

    @functools.cached_property
    def closing(self) -> Closing:
        return Closing(self._tokens(), self._vocabulary)

    @functools.cached_property
    def _threads(self) -> llguidance.LLExecutor:
        return llguidance.LLExecutor(num_threads=MASK_THREADS)

    def known(self, constraint: Constraint) -> Start | str | None:
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

    def _compile(self, constraint: Constraint) -> Start | str:
        """Its beginning, or why there is none."""
        tokenizer = self._tokens()
        if self._unspelt:
            return self._unspelt
        asked = {"kind": constraint.kind, "text": constraint.text, "choices": constraint.choices}
        answer = self._ask(json.dumps(asked))
        if "error" in answer:
            return answer["error"]
        matcher = llguidance.LLMatcher(tokenizer, answer["grammar"], log_level=0, limits=limits())
        return matcher.get_error() if matcher.is_error() else Start(matcher, self.closing.way(matcher))

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
                [sys.executable, "-m", "services.grammar.process"],
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
