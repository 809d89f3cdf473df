"""The one error that the client raises."""

from __future__ import annotations

import grpc

RETRY_METADATA = "grpc-retry-pushback-ms"
"""Trailing metadata in which a server that is full says when to come back, under gRPC's own name for it."""
NO_SERVER = "no server answers at"
_NOT_CONNECTED = (
    "failed to connect to all addresses",
    "connections to all backends failing",
    "errors resolving",
    "DNS resolution failed",
)
"""How gRPC's own words begin where it reached nobody; a server that answers UNAVAILABLE says something else."""


class FocusClientError(Exception):
    """A request that failed.

    `code` is the name of a gRPC status, such as "INVALID_ARGUMENT" or "UNAVAILABLE", wherever the failure arose: in the
    client, before the stream, or inside it. `message` is one line for a person. `retry_after_s` is the time after which
    a server that is full says to come back; None where it says nothing, as of a request that it can never answer.
    """

    def __init__(self, code: str, message: str, *, retry_after_s: float | None = None):
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s


def is_not_connected(error: grpc.RpcError) -> bool:
    """Whether gRPC reached nobody at the address."""
    return error.code() is grpc.StatusCode.UNAVAILABLE and (error.details() or "").startswith(_NOT_CONNECTED)


def from_rpc_error(error: grpc.RpcError, address: str, *, deadline_passed: bool) -> FocusClientError:
    """The same failure with its code by name; says what to do where gRPC's own words would not."""
    code, details = error.code().name, error.details() or ""
    if is_not_connected(error):
        return FocusClientError(code, f"{NO_SERVER} {address} ({details})")
    if code == "DEADLINE_EXCEEDED" and deadline_passed:
        return FocusClientError(code, "the answer did not end within the timeout")
    wait_s = retry_after_s(error)
    return FocusClientError(code, details or f"the server at {address} gave no details", retry_after_s=wait_s)


def retry_after_s(error: grpc.RpcError) -> float | None:
    """When the server says to come back; None where it does not."""
    said = dict(error.trailing_metadata() or ()).get(RETRY_METADATA)
    return int(said) / 1000 if isinstance(said, str) and said.isdecimal() else None
