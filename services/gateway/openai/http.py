"""The public door over HTTP, as OpenAI's clients know it: chat and text completions, the model, health, a page."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from focusllava.v1 import focus_pb2, llm_pb2
from services.common.call_metadata import REQUEST_ID_HEADER
from services.common.errors import FocusError, InvalidInput, Overloaded, TooLarge
from services.common.tracing import join_trace
from services.gateway.admission import AdmissionLimits, request_id_of
from services.gateway.callers import Caller
from services.gateway.chat import ChatService
from services.gateway.deadline import TIMEOUT_METADATA, Deadline
from services.gateway.health import Health
from services.gateway.held_bytes import Holding
from services.gateway.keys import Keys
from services.gateway.openai.completion import CompletionRequest
from services.gateway.openai.errors import ModelNotFound, error_object, error_response, refusal, status_of_event
from services.gateway.openai.hosts import wrong_host
from services.gateway.openai.merged import merged
from services.gateway.openai.request import ChatCompletionRequest
from services.gateway.openai.response import ChatWriter, Collected, TextWriter, Writer, whole
from services.gateway.openai.settings import Asked, Settings
from services.gateway.playground import Asset

"""The header with a request's id; Ray Serve makes one where there is none, and has it in the answer."""
_COMPLETIONS: dict[str, tuple[type[Settings], type[Writer]]] = {
    "/v1/chat/completions": (ChatCompletionRequest, ChatWriter),
    "/v1/completions": (CompletionRequest, TextWriter),
}
_OPEN = ("/health", "/ready")
"""Paths that ask for no key: probes have none."""
_ROUTES = {**dict.fromkeys(_COMPLETIONS, "POST"), "/v1/models": "GET", **dict.fromkeys(_OPEN, "GET")}
_MODEL_PATH = "/v1/models/"
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))

READERS = 4
"""Most bodies that are read and decoded at once: one takes up to 3.5 times its bytes meanwhile, as text, base64 and
image."""

IndexedEvent = tuple[int, focus_pb2.ChatResponse]
"""The number of a prompt, and an event of the answer to it."""
Events = AsyncGenerator[IndexedEvent, None]


class HttpDoor:
    """Answers HTTP requests with what `service` answers gRPC calls with; knows nothing of Ray."""

    def __init__(
        self,
        service: ChatService,
        health: Health,
        keys: Keys,
        *,
        model: str,
        max_model_len: int,
        samplers: Mapping[str, Any] | None = None,
        page: Mapping[str, Asset] | None = None,
        cors_origins: Sequence[str] = (),
        allowed_hosts: Sequence[str] = (),
    ):
        """max_model_len: most tokens of prompt and answer together. samplers: what the checkpoint's do by default, for
        who asks about the model. page: the playground's files by path; unset: there is none. cors_origins: the sites
        whose pages may ask, as in "https://example.org"; "*" is any. allowed_hosts: as `wrong_host` has it."""
        self._service, self._health, self._keys = service, health, keys
        self._model, self._max_model_len, self._created = model, max_model_len, int(time.time())
        self._samplers, self._page = dict(samplers or {}), dict(page or {})
        self._cors_origins, self._allowed_hosts = tuple(cors_origins), tuple(allowed_hosts)
        self._readers = asyncio.Semaphore(READERS)

    async def respond(self, request: Request) -> Response:
        """Never raises but when the client has gone."""
        response = await self._respond(request)
        return _ForOtherSites(response, self._cors_origins) if self._cors_origins else response

    async def _respond(self, request: Request) -> Response:
        join_trace(request.headers)
        path = request.url.path.rstrip("/")
        request_id = request.headers.get(REQUEST_ID_HEADER) or uuid.uuid4().hex
        method = "GET" if path in self._page or path.startswith(_MODEL_PATH) else _ROUTES.get(path)
        try:
            if method is None:
                return error_response(404, f"{path or '/'} is not here; {', '.join(_ROUTES)} are")
            allowed = (
                ("GET", "HEAD") if method == "GET" else (method,)
            )  # the server leaves the body of a HEAD's answer out
            if request.method not in allowed:
                message = f"{path or '/'} takes {method}, this is {request.method}"
                return error_response(405, message, headers={"allow": ", ".join(allowed)})
            if path in _OPEN:
                return await self._state()
            if wrong := wrong_host(request, self._allowed_hosts):
                return error_response(421, wrong)
            if path in self._page:  # asks for no key: it is where a person gives one
                return self._page[path].respond(request)
            caller = self._keys.caller(request.headers.get("authorization"))
            if path in _COMPLETIONS:
                return await self._complete(request, request_id, caller, *_COMPLETIONS[path])
            if path == "/v1/models":
                return JSONResponse({"object": "list", "data": [self._description()]})
            self._check_model(path.removeprefix(_MODEL_PATH))
            return JSONResponse(self._description())
        except ClientDisconnect:
            raise
        except Exception as error:
            return refusal(error, request_id)

    async def _complete(
        self, request: Request, request_id: str, caller: Caller, kind: type[Settings], writer_type: type[Writer]
    ) -> Response:
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":  # which no page of another site can send without being asked first
            return error_response(415, f"content-type: is {media_type[:60]!r}, expected 'application/json'")
        caller.check()  # before megabytes are read
        with self._service.held.holding(caller) as holding:
            async with self._readers:
                body = await _read(request, _most_bytes(self._service.limits), holding)
                asked, chats = await asyncio.to_thread(self._read_chats, kind, body, request_id)  # decodes megabytes
                del body
        deadline = Deadline.said(request.headers.get(TIMEOUT_METADATA))
        events = merged([self._service.chat(chat, request_id_of(chat), deadline, caller) for chat in chats])
        try:
            first = await anext(events)  # or what refuses it
            new_writer = functools.partial(writer_type, self._model, asked)
            if not asked.stream:
                return await _whole(_again(first, events), new_writer, asked)
        except Overloaded as error:  # which knows when to try again
            raise Overloaded(asked.renamed(str(error)), retry_after_s=error.retry_after_s) from None
        except FocusError as error:
            raise type(error)(asked.renamed(str(error))) from None
        except BaseException:
            await events.aclose()
            raise
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        chunks = _chunks(_again(first, events), new_writer, asked)
        return StreamingResponse(chunks, media_type="text/event-stream", headers=headers)

    def _read_chats(
        self, kind: type[Settings], body: bytes, request_id: str
    ) -> tuple[Asked, list[focus_pb2.ChatRequest]]:
        settings = kind.parse(body, self._service.limits.max_text_chars)
        self._check_model(settings.model)
        request_id = settings.request_id or request_id
        return settings.asked(request_id), settings.to_chat_requests(request_id)

    def _check_model(self, name: str) -> None:
        if name != self._model:
            raise ModelNotFound(f"is {name[:60]!r}, this server has {self._model!r}", field="model")

    def _description(self) -> dict[str, Any]:
        """The model as OpenAI has it, vLLM's max_model_len, the door's limits and the samplers' defaults."""
        limits = self._service.limits
        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "focusllava",
            "max_model_len": self._max_model_len,
            "focus": {
                "max_tokens": limits.max_tokens,
                "max_images": limits.max_images,
                "max_image_bytes": limits.media.max_bytes,
                "max_image_bytes_total": limits.max_image_bytes_total,
                "max_image_pixels": limits.media.max_pixels,
                "max_text_chars": limits.max_text_chars,
                **self._samplers,
            },
        }

    async def _state(self) -> Response:
        failures = await self._health.failures()
        if failures:
            return error_response(503, "; ".join(failures))
        return JSONResponse({"status": "ok"})


class _ForOtherSites(Response):
    """A response that tells browsers which sites' pages may read it, and answers their question before a request."""

    def __init__(self, response: Response, origins: Sequence[str]):
        super().__init__()
        self._cors = CORSMiddleware(
            response,
            allow_origins=origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=(REQUEST_ID_HEADER,),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._cors(scope, receive, send)


def _most_bytes(limits: AdmissionLimits) -> int:
    """Largest body: its images in base64, its text with every character escaped, and the rest."""
    return limits.max_image_bytes_total * 4 // 3 + 12 * limits.max_text_chars + 2**20


async def _read(request: Request, limit: int, holding: Holding) -> bytes:
    """The body, whose bytes are held from before the first. Raises TooLarge, InvalidInput, Overloaded."""
    said = request.headers.get("content-length", "")
    if said.isdecimal() and len(said) < 16:
        holding.add(min(int(said), limit))
    body = bytearray()
    async for piece in request.stream():
        if len(body) + len(piece) > limit:
            raise TooLarge(f"has more than {limit} bytes", field="body")
        body += piece
        holding.add(max(0, len(body) - holding.amount))
    if not body:
        raise InvalidInput("is empty, expected JSON", field="body")
    return bytes(body)


async def _again(first: IndexedEvent, events: Events) -> Events:
    """The events with the first one, which was taken out, in its place."""
    async with contextlib.aclosing(events):
        yield first
        async for event in events:
            yield event


async def _whole(events: Events, new_writer: Callable[..., Writer], asked: Asked) -> Response:
    answers: dict[int, Collected] = {}
    async with contextlib.aclosing(events):
        async for index, event in events:
            kind = event.WhichOneof("event")
            if kind == "started":
                answers[index] = Collected(writer=new_writer(event.started, index))
            elif kind == "token":
                answers[index].tokens.append(event.token)
            elif kind == "finished":
                answers[index].finished = event.finished
            elif kind == "focus_maps":
                answers[index].maps = event.focus_maps
            else:
                return error_response(status_of_event(event.error.code), asked.renamed(event.error.message))
    return JSONResponse(whole([answers[index] for index in sorted(answers)]))


async def _chunks(events: Events, new_writer: Callable[..., Writer], asked: Asked) -> AsyncGenerator[bytes, None]:
    writers: dict[int, Writer] = {}
    finished: list[llm_pb2.Finished] = []
    async with contextlib.aclosing(events):
        async for index, event in events:
            kind = event.WhichOneof("event")
            chunk = None
            if kind == "started":
                writers[index] = new_writer(event.started, index)
                chunk = writers[index].first_chunk()
            elif kind == "token":
                chunk = writers[index].chunk(event.token)
            elif kind == "finished":
                finished.append(event.finished)
                chunk = writers[index].last_chunk(event.finished)
            elif kind == "focus_maps":
                chunk = writers[index].maps_chunk(event.focus_maps)
            else:  # clients raise it, and no [DONE] follows
                yield _data(error_object(status_of_event(event.error.code), asked.renamed(event.error.message)))
                return
            if chunk:
                yield _data(chunk)
        if asked.usage:
            yield _data(writers[0].usage_chunk(finished))
        yield b"data: [DONE]\n\n"


def _data(chunk: dict[str, Any]) -> bytes:
    return f"data: {_JSON.encode(chunk)}\n\n".encode()
