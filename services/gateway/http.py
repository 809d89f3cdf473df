"""The public door over HTTP, as OpenAI's clients know it: /v1/chat/completions and /v1/models."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from focusllava.v1 import focus_pb2, llm_pb2
from services.common.errors import Code, FocusError, InvalidInput, TooLarge
from services.common.grpc_status import status_of
from services.gateway.admission import AdmissionLimits, request_id_of
from services.gateway.chat import ChatService
from services.gateway.openai_request import ChatCompletionRequest, field_of, named_here, parse, to_chat_request
from services.gateway.openai_response import CompletionWriter
from services.gateway.stages import TIMEOUT_METADATA, Deadline

REQUEST_ID_HEADER = "x-request-id"
"""Of a request; Ray Serve makes one where there is none, and has it in the answer."""
_ROUTES = {"/v1/chat/completions": "POST", "/v1/models": "GET"}
_MODEL_PATH = "/v1/models/"
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
"""OpenAI's clients try again what ends with 429 or 500 and more; after a deadline nobody waits for it."""
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error",
          405: "invalid_request_error", 413: "invalid_request_error",
          415: "invalid_request_error", 429: "rate_limit_error"}  # fmt: skip


class HttpDoor:
    """Answers HTTP requests with what `service` answers gRPC calls with; knows nothing of Ray."""

    def __init__(self, service: ChatService, model: str):
        self._service, self._model, self._created = service, model, int(time.time())

    async def respond(self, request: Request) -> Response:
        """Never raises but when the client has gone."""
        path = request.url.path.rstrip("/")
        request_id = request.headers.get(REQUEST_ID_HEADER) or uuid.uuid4().hex
        method = "GET" if path.startswith(_MODEL_PATH) else _ROUTES.get(path)
        try:
            if method is None:
                return _error(404, f"{path or '/'} is not here; {' and '.join(_ROUTES)} are")
            if request.method != method:
                return _error(405, f"{path} takes {method}, this is {request.method}", headers={"allow": method})
            if path == "/v1/chat/completions":
                return await self._complete(request, request_id)
            if path == "/v1/models":
                return JSONResponse({"object": "list", "data": [self._description()]})
            self._check_model(path.removeprefix(_MODEL_PATH))
            return JSONResponse(self._description())
        except ClientDisconnect:
            raise
        except Exception as error:
            return _refusal(error, request_id)

    async def _complete(self, request: Request, request_id: str) -> Response:
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":  # which no page of another site can send without being asked first
            return _error(415, f"content-type: is {media_type[:60]!r}, expected 'application/json'")
        body = await _read(request, _most_bytes(self._service.limits))
        wanted, chat = await asyncio.to_thread(self._read_chat, body, request_id)  # decodes megabytes
        del body
        deadline = Deadline.said(request.headers.get(TIMEOUT_METADATA))
        events = self._service.chat(chat, request_id_of(chat), deadline)
        try:
            writer = CompletionWriter(self._model, (await anext(events)).started)  # or what refuses it
            if not wanted.stream:
                return await _whole(events, writer, wanted)
        except FocusError as error:
            raise type(error)(named_here(str(error))) from None
        except BaseException:
            await events.aclose()
            raise
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return StreamingResponse(_chunks(events, writer, wanted), media_type="text/event-stream", headers=headers)

    def _read_chat(self, body: bytes, request_id: str) -> tuple[Wanted, focus_pb2.ChatRequest]:
        asked = parse(body, self._service.limits.max_text_chars)
        self._check_model(asked.model)
        return Wanted.of(asked), to_chat_request(asked, request_id)

    def _check_model(self, name: str) -> None:
        if name != self._model:
            raise _ModelNotFound(f"is {name[:60]!r}, this server has {self._model!r}", field="model")

    def _description(self) -> dict[str, Any]:
        return {"id": self._model, "object": "model", "created": self._created, "owned_by": "focusllava"}


class _ModelNotFound(FocusError):
    code = Code.NOT_FOUND


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How the answer is to be written: all that outlives the request's body, which may be 80 MB."""

    stream: bool
    usage: bool
    """At the end of a stream."""
    logprobs: bool

    @classmethod
    def of(cls, asked: ChatCompletionRequest) -> Wanted:
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return cls(stream=asked.stream, usage=usage, logprobs=asked.logprobs)


def _most_bytes(limits: AdmissionLimits) -> int:
    """Of a body: its images in base64, its text with every character escaped, and the rest."""
    return limits.max_image_bytes_total * 4 // 3 + 12 * limits.max_text_chars + 2**20


async def _read(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        if len(body) + len(piece) > limit:
            raise TooLarge(f"has more than {limit} bytes", field="body")
        body += piece
    if not body:
        raise InvalidInput("is empty, expected JSON", field="body")
    return bytes(body)


async def _whole(events: AsyncGenerator[focus_pb2.ChatResponse, None], writer: CompletionWriter,
                 wanted: Wanted) -> Response:  # fmt: skip
    tokens: list[llm_pb2.Token] = []
    async with contextlib.aclosing(events):
        async for event in events:
            kind = event.WhichOneof("event")
            if kind == "token":
                tokens.append(event.token)
            elif kind == "finished":
                answer = writer.whole(tokens, event.finished, logprobs=wanted.logprobs)
                return JSONResponse(answer)
            else:
                return _error(_status(event.error.code), named_here(event.error.message))
    raise AssertionError("an answer ends with finished or error")


async def _chunks(events: AsyncGenerator[focus_pb2.ChatResponse, None], writer: CompletionWriter,
                  wanted: Wanted) -> AsyncGenerator[bytes, None]:  # fmt: skip
    async with contextlib.aclosing(events):
        yield _data(writer.first_chunk())
        async for event in events:
            kind = event.WhichOneof("event")
            if kind == "token":
                if event.token.text or event.token.logprobs:
                    yield _data(writer.chunk(event.token))
            elif kind == "finished":
                yield _data(writer.last_chunk(event.finished))
                if wanted.usage:
                    yield _data(writer.usage_chunk(event.finished))
                yield b"data: [DONE]\n\n"
            else:  # clients raise it, and no [DONE] follows
                status = _status(event.error.code)
                yield _data(_error_object(status, named_here(event.error.message)))


def _status(code: str) -> int:
    """Of an error event, whose code may be a stage's."""
    return next((status for known, status in _STATUSES.items() if known.value == code), 500)


def _data(chunk: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def _refusal(error: Exception, request_id: str) -> Response:
    code, message = status_of(error, request_id)
    status = 413 if isinstance(error, TooLarge) else _STATUSES[code]  # 429 would be tried again, in vain
    return _error(status, message, code="model_not_found" if isinstance(error, _ModelNotFound) else None)


def _error(status: int, message: str, *, code: str | None = None, headers: dict[str, str] | None = None) -> Response:
    headers = {**_RETRY.get(status, {}), **(headers or {})}
    return JSONResponse(_error_object(status, message, code=code), status_code=status, headers=headers)


def _error_object(status: int, message: str, *, code: str | None = None) -> dict[str, Any]:
    kind = _TYPES.get(status, "server_error")
    return {"error": {"message": message, "type": kind, "param": field_of(message), "code": code}}
