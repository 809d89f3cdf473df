"""Logs of the service: lines for people, or one JSON object a line for machines, with the id of the request.

No line holds what was asked or answered: neither text nor image.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

from services.common.call_metadata import REQUEST_ID_HEADER, text_metadata
from services.common.errors import InvalidInput

LOGGER = "focusllava"
FORMAT = "FOCUSLLAVA_LOG_FORMAT"
"""The variable of the environment that says "text", its default, or "json"."""
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the request that is being answered."""


def set_up_logs(environment: Mapping[str, str], stream: TextIO | None = None) -> None:
    """Has our loggers write to `stream`, standard error unless it is given. Raises InvalidInput for another format."""
    asked = environment.get(FORMAT, "text")
    if asked not in _FORMATTERS:
        raise InvalidInput(f"is {asked!r}, expected {' or '.join(_FORMATTERS)}", field=FORMAT)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_FORMATTERS[asked]())
    logger = logging.getLogger(LOGGER)
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def log_event(message: str, **facts: Any) -> None:
    """Writes a line with facts beside its message: numbers, names and states of a request."""
    logging.getLogger(LOGGER).info(message, extra={"facts": facts})


def set_request_id(request_id: str) -> None:
    """Has the lines of this task bear the id.

    A deployment calls it and does not name REQUEST_ID: Ray Serve could not pickle the class then.
    """
    REQUEST_ID.set(request_id)


def set_request_id_from(context: Any, otherwise: str = "") -> None:
    """Has the lines of this task bear the id in the metadata of a call, or `otherwise` where it has none."""
    set_request_id(text_metadata(context).get(REQUEST_ID_HEADER) or otherwise)


def request_id_metadata() -> tuple[str, str]:
    """Metadata for a call that is a part of this task's request."""
    return REQUEST_ID_HEADER, REQUEST_ID.get()


class Lines(logging.Formatter):
    """Writes lines for people."""

    def format(self, record: logging.LogRecord) -> str:
        facts = _facts(record)
        said = " ".join(f"{name}={value}" for name, value in facts.items())
        line = f"{_time(record)} {record.levelname} {record.getMessage()}{' ' if said else ''}{said}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonLines(logging.Formatter):
    """Writes a JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {"time": _time(record), "level": record.levelname, "message": record.getMessage(), **_facts(record)}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


_FORMATTERS: dict[str, type[logging.Formatter]] = {"text": Lines, "json": JsonLines}


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    request_id = REQUEST_ID.get()
    return {**({"request_id": request_id} if request_id else {}), **getattr(record, "facts", {})}
