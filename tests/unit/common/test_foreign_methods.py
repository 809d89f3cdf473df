"""Every RPC has an answer in every application, and only the right one does it."""

from __future__ import annotations

import inspect

import grpc
import pytest

from focusllava.v1 import encoder_pb2, focus_pb2, llm_pb2
from services.common.foreign_methods import ForeignMethods
from services.common.grpc_status import Refused

METHODS = {
    method.name: method
    for file in (encoder_pb2, focus_pb2, llm_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


class Context:
    code = details = None

    def invocation_metadata(self):
        return (("application", "llm"),)

    def set_code(self, code):
        self.code = code

    def set_details(self, details):
        self.details = details


def test_no_rpc_is_left_out():
    ours = {name for name in vars(ForeignMethods) if not name.startswith("_")}
    assert ours == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
async def test_a_foreign_method_is_unimplemented(name):
    context, method = Context(), getattr(ForeignMethods(), name)
    assert inspect.isasyncgenfunction(method) == METHODS[name].server_streaming
    with pytest.raises(Refused):
        answer = method(None, context)
        await (anext(answer) if METHODS[name].server_streaming else answer)
    assert context.code is grpc.StatusCode.UNIMPLEMENTED
    assert context.details == f"{name} is not a method of the application 'llm'"
