"""Errors as OpenAI's clients know them: a status, and one object with the message, its type and the field."""

from __future__ import annotations

import math
from typing import Any

from starlette.responses import JSONResponse, Response

from services.common.errors import Code, FocusError, Overloaded, TooLarge, WrongKey
from services.common.grpc_status import status_of
from services.gateway.openai.fields import field_of

_STATUSES = {
    Code.INVALID_ARGUMENT: 400,
    Code.UNAUTHENTICATED: 401,
    Code.NOT_FOUND: 404,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.FAILED_PRECONDITION: 503,  # the stages serve different checkpoints, as during a change of them
    Code.UNAVAILABLE: 503,
    Code.DEADLINE_EXCEEDED: 504,
    Code.INTERNAL: 500,
}
_RETRY = {429: {"retry-after": "1"}, 503: {"retry-after": "1"}, 504: {"x-should-retry": "false"}}
"""Headers that tell a client whether to try again. OpenAI's do so after 429, and 500 and more; after a deadline nobody
waits for the answer."""
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error",
          405: "invalid_request_error", 408: "invalid_request_error", 413: "invalid_request_error",
          415: "invalid_request_error", 421: "invalid_request_error", 429: "rate_limit_error"}  # fmt: skip


class ModelNotFound(FocusError):
    """A request for a model that is not the served one."""

    code = Code.NOT_FOUND


_CODES: dict[type[FocusError], str] = {
    ModelNotFound: "model_not_found",
    Overloaded: "rate_limit_exceeded",
    WrongKey: "invalid_api_key",
}
"""OpenAI's names of errors, where it has one."""


def refusal(error: Exception, request_id: str) -> Response:
    """The answer to a request that ends with `error` before anything is sent."""
    code, message = status_of(error, request_id)
    status = 413 if isinstance(error, TooLarge) else _STATUSES[code]  # 429 would be tried again, in vain
    headers = {}
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    elif isinstance(error, WrongKey):
        headers["www-authenticate"] = "Bearer"
    name = next((name for kind, name in _CODES.items() if isinstance(error, kind)), None)
    return error_response(status, message, code=name, headers=headers)


def error_response(status: int, message: str, *, code: str | None = None,
                   headers: dict[str, str] | None = None) -> Response:  # fmt: skip
    """An error whose message begins with the field, if one is to blame."""
    headers = {**_RETRY.get(status, {}), **(headers or {})}
    return JSONResponse(error_object(status, message, code=code), status_code=status, headers=headers)


def error_object(status: int, message: str, *, code: str | None = None) -> dict[str, Any]:
    """The body of an error, or the last piece of a stream that breaks off."""
    kind = _TYPES.get(status, "server_error")
    return {"error": {"message": message, "type": kind, "param": field_of(message), "code": code}}


def status_of_event(code: str) -> int:
    """The HTTP status of an error event, whose code may be a stage's."""
    return next((status for known, status in _STATUSES.items() if known.value == code), 500)
