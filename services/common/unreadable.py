"""Requests that are no protobuf of their kind. gRPC answers these with UNKNOWN and Python's words for the failure."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from services.common.errors import InvalidInput


class Unreadable:
    """What a handler is given in place of a request that cannot be read."""


def reads_safely(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    """The handler of a method, which is given `Unreadable()` where gRPC would answer itself."""
    read_message = handler.request_deserializer

    def read(data: bytes) -> Any:
        try:
            return read_message(data)
        except DecodeError:
            return Unreadable()

    return handler._replace(request_deserializer=read)


def check_readable(request: object) -> None:
    """Raises InvalidInput for a request that could not be read."""
    if isinstance(request, Unreadable):
        raise InvalidInput("is no protobuf message of the kind that this method takes", field="request")


class SafeReading(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Has every method of a server read safely."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        return handler and reads_safely(handler)
