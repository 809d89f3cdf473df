"""The gateway's logs: one line a request with its id, for people or machines, and nothing of what was asked."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re

import grpc
import pytest

from services.common.errors import InvalidInput
from services.common.logs import LOGGER, REQUEST_ID, log_event, set_up_logs
from services.gateway.keys import Keys, hash_of
from tests.fakes.http_door import open_door
from tests.fakes.stages import DIED, METRICS, LanguageModel

KEY = "fl-of-alice"


@pytest.fixture
def logger():
    logger = logging.getLogger(LOGGER)
    before = logger.handlers, logger.level, logger.propagate
    yield logger
    logger.handlers, logger.level, logger.propagate = before


@pytest.fixture
def written(logger):
    stream = io.StringIO()
    set_up_logs({"FOCUSLLAVA_LOG_FORMAT": "json"}, stream)
    return lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


async def test_a_request_is_one_line_with_its_id_and_without_what_was_asked(written):
    keys = Keys(METRICS, text=f"keys: [{{name: alice, sha256: {hash_of(KEY)}}}]")
    async with open_door(keys=keys) as door:
        for request_id in ("mine-1", "mine-2"):
            await door.post({}, **{"x-request-id": request_id, "authorization": f"Bearer {KEY}"})
    first, second = (line for line in written() if line["message"] == "request ended")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first.pop("time"))
    assert first.pop("seconds") >= 0 and first.pop("first_token_ms") >= 0
    assert first == {
        "level": "INFO", "message": "request ended", "request_id": "mine-1", "outcome": "ok", "key": "alice",
        "prompt_tokens": 7, "completion_tokens": 5,
    }  # fmt: skip
    assert second["request_id"] == "mine-2"
    text = json.dumps([first, second])
    assert "card" not in text and KEY not in text and hash_of(KEY) not in text


async def test_what_goes_wrong_on_the_way_bears_the_requests_id(written):
    lost = (0, grpc.StatusCode.INTERNAL, DIED)
    async with open_door(LanguageModel(lost)) as door:
        slow = asyncio.create_task(door.post({}, **{"x-request-id": "lost-once"}))
        await door.post({"messages": []}, **{"x-request-id": "refused"})
        await slow
    lines = written()
    retried = next(line for line in lines if line["level"] == "WARNING")
    assert retried["request_id"] == "lost-once" and "trying again" in retried["message"]
    ended = {line["request_id"]: line["outcome"] for line in lines if line["message"] == "request ended"}
    assert ended == {"lost-once": "ok", "refused": "INVALID_ARGUMENT"}


def test_lines_for_people_and_exceptions_in_both(logger):
    for form in ("text", "json"):
        stream = io.StringIO()
        set_up_logs({"FOCUSLLAVA_LOG_FORMAT": form}, stream)
        token = REQUEST_ID.set("r-1")
        log_event("request ended", outcome="ok", seconds=0.5)
        try:
            raise ValueError("line 1\nline 2")
        except ValueError:
            logger.error("internal error", exc_info=True)
        REQUEST_ID.reset(token)
        first, second = stream.getvalue().split("\n", 1)
        if form == "text":
            assert first.endswith(" INFO request ended request_id=r-1 outcome=ok seconds=0.5")
            assert "ERROR internal error request_id=r-1\nTraceback" in second
        else:
            assert json.loads(first)["seconds"] == 0.5 and second.count("\n") == 1
            assert json.loads(second)["exception"].endswith("ValueError: line 1\nline 2")


def test_another_format_is_refused(logger):
    with pytest.raises(InvalidInput, match="^FOCUSLLAVA_LOG_FORMAT: is 'xml', expected text or json$"):
        set_up_logs({"FOCUSLLAVA_LOG_FORMAT": "xml"})
