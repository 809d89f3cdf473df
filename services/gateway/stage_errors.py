"""A stage's status as the error that the gateway raises."""

from __future__ import annotations

import logging

import grpc

from services.common.errors import (
    DeadlineExceeded,
    FocusError,
    InternalError,
    InvalidInput,
    NotOnShelf,
    Overloaded,
    StageUnavailable,
    TooLarge,
    WrongFingerprint,
)
from services.common.grpc_status import replica_is_lost, split_wait
from services.common.logs import LOGGER

_log = logging.getLogger(LOGGER)


class UnusableVisualTokens(InternalError):
    """The LLM stage refuses what the encoder or the cache gave for an image."""


def stage_error(stage: str, code: grpc.StatusCode, details: str, wait_s: float | None = None) -> FocusError:
    """A stage's status as the error that the gateway raises. Only our own stages' messages pass through.

    wait_s: after which time the stage may have room, where it says so.
    """
    if replica_is_lost(details) or code in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,  # we did not cancel: the replica or its proxy went away
        grpc.StatusCode.UNAUTHENTICATED,  # a new replica listens where a lost one did
    ):
        return StageUnavailable(f"the {stage} stage is restarting or cannot be reached; try again")
    if code is grpc.StatusCode.NOT_FOUND and details.startswith("images["):
        return NotOnShelf(details)
    if code is grpc.StatusCode.NOT_FOUND:
        return StageUnavailable(f"the {stage} stage is not deployed")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded("the request took longer than its deadline")
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        if stage == "llm" and details.startswith("images["):  # the encoder made them, or the cache gave them
            _log.error("%s stage: %s", stage, details)
            return UnusableVisualTokens("an image's visual tokens were of no use; try again")
        return InvalidInput(details)
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        return WrongFingerprint(details)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        details, told_s = split_wait(details)
        wait_s = told_s if wait_s is None else wait_s
        if wait_s is None:
            return TooLarge(details)
        full = "max_queued_requests" in details  # which is of no use to who asks
        return Overloaded(f"the {stage} stage is full; try again later" if full else details, retry_after_s=wait_s)
    _log.error("%s stage: %s: %s", stage, code.name, details)
    return FocusError(f"the {stage} stage failed")
