"""What the engine tells its caller beside tokens: counters, and whom a failed step has ended."""

from __future__ import annotations

from dataclasses import dataclass

from services.common.errors import InternalError, InvalidInput
from services.common.types import DecisionEvent, FinishedEvent, TokenEvent

Event = TokenEvent | DecisionEvent | FinishedEvent | InvalidInput
"""The error ends a request whose constraint leaves no way to go on; nothing follows it."""


class StepFailed(InternalError):
    """A step failed for these requests, which are gone and their pages free; the engine goes on.

    events: what the step brought those beside them, none when the pass itself failed.
    """

    def __init__(self, request_ids: tuple[str, ...], events: tuple[tuple[str, Event], ...] = ()):
        super().__init__("the language model failed on this request; try again, and see the server's log")
        self.request_ids, self.events = request_ids, events


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    running: int
    waiting: int
    kv_pages_used: int
    kv_pages_total: int
    """Pages of the pool that both KV cache groups share."""
    kv_pages_cached: int
    """Pages that no request holds, kept for a later request with the same beginning; not among those used."""
    kv_pages_wanted: int
    """Pages that requests hold, and those that the prompts of waiting ones would take."""
    kv_page_bytes: int
    prefill_tokens_left: float
    """Prompt tokens that are still to be prefilled, each counted by the share of the layers that is before it."""
    failed_steps: int
    """Steps that failed and brought nobody anything, since a request last ended well."""
    prompt_tokens: int
    """This and the following: totals since the start; a request's tokens count at its end, if its prefill ended."""
    completion_tokens: int
    visual_tokens_sampled: int
    visual_tokens_kept: int
    prompt_tokens_reused: int
    """Prompt tokens whose lower layers an earlier request had computed; not what a preempted one finds of its own."""
    prefill_passes: int
    """Steps that computed prefill chunks; a step may count here and below."""
    decode_passes: int
    preemptions: int
