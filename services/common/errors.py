"""Errors that users meet: each names the field and the value, and carries the status it becomes at the edge."""

from __future__ import annotations

import enum


class Code(enum.Enum):
    """The statuses we use, by gRPC name; `services` map them at their edges."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    NOT_FOUND = "NOT_FOUND"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    UNAVAILABLE = "UNAVAILABLE"
    INTERNAL = "INTERNAL"


class FocusError(Exception):
    """Base of every error that may reach a client."""

    code = Code.INTERNAL

    def __init__(self, message: str, *, field: str = ""):
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field


class InvalidInput(FocusError):
    """The caller sent something that can never succeed."""

    code = Code.INVALID_ARGUMENT


class WrongFingerprint(FocusError):
    """The two sides do not run the same checkpoint."""

    code = Code.FAILED_PRECONDITION


class NotAMethod(FocusError):
    """The call is another application's."""

    code = Code.UNIMPLEMENTED


class NotOnShelf(FocusError):
    """The request names visual tokens that are not in this node's shared memory: the caller is to send them."""

    code = Code.NOT_FOUND


class TooLarge(FocusError):
    """The request can never fit this server's memory or limits."""

    code = Code.RESOURCE_EXHAUSTED


class Overloaded(FocusError):
    """There is no room now; a later try may succeed."""

    code = Code.RESOURCE_EXHAUSTED

    def __init__(self, message: str, *, field: str = "", retry_after_s: float = 1.0):
        super().__init__(message, field=field)
        self.retry_after_s = retry_after_s
        """Seconds after which a try may succeed."""


class WrongKey(FocusError):
    """The caller brought no API key, or one that is not known."""

    code = Code.UNAUTHENTICATED


class WrongSecret(FocusError):
    """The caller of a stage does not bear a secret that the stage accepts."""

    code = Code.UNAUTHENTICATED


class StageUnavailable(FocusError):
    """A stage could not be reached."""

    code = Code.UNAVAILABLE


class DeadlineExceeded(FocusError):
    """The caller's deadline, or the server's own limit, passed."""

    code = Code.DEADLINE_EXCEEDED


class InternalError(FocusError):
    """Our fault: the request was fine."""

    code = Code.INTERNAL


def with_field(error: FocusError, field: str) -> FocusError:
    """The same error, naming where in the caller's request the image stands instead of the stage's own field."""
    message = str(error)
    if message.startswith("image: "):
        return type(error)(message.removeprefix("image: "), field=field)
    return error
