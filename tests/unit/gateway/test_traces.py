"""One trace of a request, from its client through the gateway to both stages, over real sockets; spans in memory."""

from __future__ import annotations

import re
import subprocess
import sys

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.common import tracing
from services.common.errors import InvalidInput
from services.common.tracing import set_up_traces
from services.gateway.keys import Keys
from tests.fakes.http_door import open_door
from tests.fakes.stages import DIED, METRICS, PNG, LanguageModel
from tests.unit.gateway.test_doors import ask_grpc, grpc_door

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CHAT, ENCODE, GENERATE = "chat", "focusllava.v1.EncoderService/Encode", "focusllava.v1.LanguageModelService/Generate"


@pytest.fixture
def spans():
    """Finished spans, by name and kind."""
    exporter = InMemorySpanExporter()
    set_up_traces({}, "test", exporter)
    yield lambda: {(span.name, span.kind.name): span for span in exporter.get_finished_spans()}
    tracing._tracer = None


async def test_a_request_over_http_is_one_trace_down_to_both_stages(spans):
    async with open_door() as door:
        status, _ = await door.post({}, traceparent=PARENT, **{"x-request-id": "mine-1"})
        assert status == 200
    found = spans()
    assert {span.context.trace_id for span in found.values()} == {0x0AF7651916CD43DD8448EB211C80319C}
    chat = found[CHAT, "SERVER"]
    assert chat.parent.span_id == 0xB7AD6B7169203331
    for method in (ENCODE, GENERATE):
        calling, served = found[method, "CLIENT"], found[method, "SERVER"]
        assert calling.parent.span_id == chat.context.span_id and served.parent.span_id == calling.context.span_id
        assert chat.start_time <= calling.start_time <= served.start_time
    assert chat.attributes == {
        "focusllava.request_id": "mine-1", "focusllava.outcome": "ok", "focusllava.prompt_tokens": 7,
        "focusllava.completion_tokens": 5, "focusllava.first_token_ms": chat.attributes["focusllava.first_token_ms"],
    }  # fmt: skip


async def test_each_request_has_a_trace_of_its_own_and_a_refused_one_says_so(spans):
    async with open_door(LanguageModel((0, grpc.StatusCode.INVALID_ARGUMENT, "turns: are too long"))) as door:
        assert (await door.post({}))[0] == 400
        refused = spans()[CHAT, "SERVER"]
        assert (await door.post({}))[0] == 200
        answered = spans()[CHAT, "SERVER"]
    assert refused.status.status_code.name == "ERROR" and refused.parent is None
    assert refused.attributes["focusllava.outcome"] == "INVALID_ARGUMENT"
    assert answered.status.status_code.name == "UNSET" and answered.parent is None
    assert answered.context.trace_id != refused.context.trace_id


async def test_the_clients_span_is_the_requests_parent_over_grpc(spans):
    tracer = TracerProvider().get_tracer("a program of the user's")
    async with grpc_door(Keys(METRICS)) as address:
        with tracer.start_as_current_span("the user's work") as work:
            await ask_grpc(address, None)
    chat = spans()[CHAT, "SERVER"]
    assert chat.parent.span_id == work.get_span_context().span_id
    assert trace.get_current_span() is trace.INVALID_SPAN


async def test_a_call_that_is_tried_again_is_two_spans_of_one_trace(spans):
    lost = (0, grpc.StatusCode.INTERNAL, DIED)
    async with open_door(LanguageModel(lost)) as door:
        assert (await door.post({}, traceparent=PARENT))[0] == 200
    assert len(door.model.metadata) == 2
    assert all(re.search("00-0af7651916cd43dd8448eb211c80319c-", said["traceparent"]) for said in door.model.metadata)


async def test_no_span_holds_what_was_asked_or_answered(spans):
    async with open_door() as door:
        await door.post({"messages": [{"role": "user", "content": "a secret question"}]})
    told = " ".join(span.to_json() for span in spans().values())
    assert "secret" not in told and "card" not in told and PNG.hex()[:40] not in told


async def test_without_a_collector_nothing_is_sent_along():
    set_up_traces({}, "test")
    async with open_door() as door:
        assert (await door.post({}, traceparent=PARENT))[0] == 200
    assert "traceparent" not in door.model.metadata[0]


def test_nothing_of_opentelemetry_is_imported_where_it_is_not_wanted():
    code = (
        "import sys, services.common.tracing as t, focusllava; t.set_up_traces({}, 'x'); t.join_trace({});"
        "from focusllava.connection import trace_metadata; assert trace_metadata() == ()\n"
        "with t.span('x') as facts: facts['a'] = 1\n"
        "assert not t.channel_interceptors() and not [m for m in sys.modules if m.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_collector_without_the_packages_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(
        InvalidInput, match=r"^OTEL_EXPORTER_OTLP_ENDPOINT: is set, .*pip install 'focusllava\[trace\]'"
    ):
        set_up_traces({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}, "test")
