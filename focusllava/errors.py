"""The one error that the client raises."""

from __future__ import annotations

import grpc


class FocusClientError(Exception):
    """A request that failed.

    `code` is the name of a gRPC status, such as "INVALID_ARGUMENT" or "UNAVAILABLE", wherever the failure arose: in the
    client, before the stream, or inside it. `message` is one line for a person.
    """

    def __init__(self, code: str, message: str):
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


def from_rpc_error(error: grpc.RpcError, address: str) -> FocusClientError:
    """The same failure with its code by name; says what to do where gRPC's own words would not."""
    code, details = error.code().name, error.details() or ""
    if code == "UNAVAILABLE":
        return FocusClientError(code, f"no server answers at {address} ({details or 'no details'})")
    if code == "DEADLINE_EXCEEDED":
        return FocusClientError(code, "the answer did not end within the timeout")
    return FocusClientError(code, details or "the server gave no details")
