"""Exception -> gRPC status and one line of text, shared by every edge: all of an exception that a client sees."""

from __future__ import annotations

import logging
import math
import re
from typing import Any, Protocol

import grpc

from focusllava.errors import RETRY_METADATA
from services.common.errors import Code, FocusError, Overloaded, WrongFingerprint
from services.common.logs import LOGGER

MAX_MESSAGE_CHARS = 500
_LOST = re.compile(
    r"actor died|actor is dead|is temporarily unavailable|actor is unavailable|ActorDied|ActorUnavailable|worker died"
    r"|WorkerCrashed|NodeDied|OwnerDied",
    re.IGNORECASE,
)
_WAIT = re.compile(r" \(in (\d+(?:\.\d+)?) s\)$")

_log = logging.getLogger(LOGGER)


class Refused(Exception):
    """Raised to Ray Serve once the status stands in the context; carries nothing but the code and the message."""

    def __init__(self, code: Code, message: str):
        super().__init__(code, message)  # both, so that it can be pickled
        self.code = code

    def __str__(self) -> str:
        return f"{self.code.value}: {self.args[1]}"


class StatusContext(Protocol):
    """The part of Ray Serve's gRPC context that an edge uses."""

    def set_code(self, code: grpc.StatusCode) -> Any: ...
    def set_details(self, details: str) -> Any: ...
    def trailing_metadata(self) -> Any: ...
    def set_trailing_metadata(self, trailing_metadata: Any) -> Any: ...


def code_of(error: BaseException) -> Code:
    """The gRPC status of an error."""
    if isinstance(error, FocusError):
        return error.code
    return Code.DEADLINE_EXCEEDED if isinstance(error, TimeoutError) else Code.INTERNAL


def status_of(error: BaseException, request_id: str = "") -> tuple[Code, str]:
    """The status and the line a client sees. An unknown exception is logged here with its traceback."""
    code = code_of(error)
    if isinstance(error, FocusError):
        return code, one_line(str(error))
    if code is Code.DEADLINE_EXCEEDED:
        return code, "the request took longer than its deadline"
    _log.error("internal error, request id %s", request_id or "unknown", exc_info=error)
    return code, f"internal error, request id {request_id or 'unknown'}"


def refuse(context: StatusContext, error: BaseException, request_id: str = "") -> Refused:
    """Sets the status for `error`; use as `raise refuse(context, error, request_id) from None`."""
    code, message = status_of(error, request_id)
    if isinstance(error, Overloaded):
        # In words too: Ray Serve drops the metadata of a call that fails, and our part of its proxy sets it again.
        message = f"{message} (in {error.retry_after_s:g} s)"
        tell_retry(context, error.retry_after_s)
    context.set_code(grpc.StatusCode[code.value])
    context.set_details(message)
    return Refused(code, message)


def split_wait(details: str) -> tuple[str, float | None]:
    """A status's message without the words that `refuse` adds to it, and the seconds that they tell."""
    found = _WAIT.search(details)
    return (details[: found.start()], float(found[1])) if found else (details, None)


def tell_retry(context: StatusContext, seconds: float) -> None:
    """Adds to a call's trailing metadata when its caller may try again."""
    # Ray's context adds its own entry each time.
    said = [pair for pair in context.trailing_metadata() or () if pair[0] != "request_id"]
    context.set_trailing_metadata([*said, (RETRY_METADATA, str(math.ceil(1000 * seconds)))])


def check_fingerprint(asked: str, ours: str, field: str = "model_fingerprint") -> None:
    """Raises WrongFingerprint unless the caller named the checkpoint that this stage serves."""
    if asked != ours:
        said = f"is {asked[:12]}..." if asked else "is empty"
        raise WrongFingerprint(f"{said}, this stage serves {ours[:12]}...", field=field)


def replica_is_lost(details: str) -> bool:
    """Whether a status says, in Ray's words, that the replica which held the request is gone."""
    return bool(_LOST.search(details))


def one_line(text: str) -> str:
    """Printable, on one line, of bounded length."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return printable if len(printable) <= MAX_MESSAGE_CHARS else printable[: MAX_MESSAGE_CHARS - 3] + "..."
