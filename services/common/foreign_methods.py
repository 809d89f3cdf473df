"""RPCs of the other applications: Serve's ingress takes any of our methods to the application that a call names."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from services.common.call_metadata import text_metadata
from services.common.errors import NotAMethod
from services.common.grpc_status import Refused, refuse


class ForeignMethods:
    """A deployment's answer to methods that it does not have; its own stand in place of these.

    Left to Ray, a call of a method that is not there ends with a traceback, or, where Ray speaks gRPC to its replicas,
    not at all.
    """

    async def Chat(self, request: Any, grpc_context: Any) -> AsyncGenerator[Any, None]:
        raise _refused("Chat", grpc_context)
        yield

    async def GetModelInfo(self, request: Any, grpc_context: Any) -> Any:
        raise _refused("GetModelInfo", grpc_context)

    async def Encode(self, request: Any, grpc_context: Any) -> Any:
        raise _refused("Encode", grpc_context)

    async def CheckEncoder(self, request: Any, grpc_context: Any) -> Any:
        raise _refused("CheckEncoder", grpc_context)

    async def Generate(self, request: Any, grpc_context: Any) -> AsyncGenerator[Any, None]:
        raise _refused("Generate", grpc_context)
        yield

    async def CheckLanguageModel(self, request: Any, grpc_context: Any) -> Any:
        raise _refused("CheckLanguageModel", grpc_context)


def _refused(method: str, context: Any) -> Refused:
    application = text_metadata(context).get("application", "")[:60]
    return refuse(context, NotAMethod(f"{method} is not a method of the application {application!r}"))
