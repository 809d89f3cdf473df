"""The HTTP door over a real socket, with real gRPC to scripted stages behind it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
from collections.abc import Mapping, Sequence
from functools import cached_property

import httpx2
import openai
import uvicorn
from starlette.requests import Request

from services.gateway.admission import AdmissionLimits
from services.gateway.health import Health
from services.gateway.keys import Keys
from services.gateway.openai.http import HttpDoor
from services.gateway.playground import Asset
from tests.fakes.stages import KEY, METRICS, PNG, WORDS, Encoder, LanguageModel, service, serving

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(PNG).decode()}}
QUESTION = {"role": "user", "content": [IMAGE, {"type": "text", "text": "What does the card say?"}]}
TEXT = "".join(WORDS)


class Door:
    """A door that is served, its stages, and two clients of it."""

    def __init__(self, url: str, model: LanguageModel, encoder: Encoder, http_door: HttpDoor):
        self.url, self.model, self.encoder, self.http_door = url, model, encoder, http_door
        self.raw = httpx2.AsyncClient(base_url=url, timeout=30, trust_env=False)

    @cached_property
    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, http_client=self.raw)

    async def ask(self, **fields):
        fields = {"model": "tiny", "messages": [QUESTION], **fields}
        return await self.client.chat.completions.create(**fields)

    async def post(self, body: dict | bytes, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, dict]:
        """Sends a body; a dict is added to a question, or for text completions to a prompt."""
        if isinstance(body, dict):
            asked = {"messages": [QUESTION]} if path == "/v1/chat/completions" else {"prompt": "Once"}
            body = json.dumps({"model": "tiny", **asked, **body}).encode()
        headers = {"content-type": "application/json", **headers}
        response = await self.raw.post(path, content=body, headers=headers)
        return response.status_code, response.json()

    async def refused(self, body: dict | bytes, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, dict]:
        status, answer = await self.post(body, path, **headers)
        return status, answer["error"]


@contextlib.asynccontextmanager
async def open_door(model: LanguageModel | None = None, encoder: Encoder | None = None,
                    limits: AdmissionLimits | None = None, cors_origins: Sequence[str] = (),
                    keys: Keys | None = None, allowed_hosts: Sequence[str] = (),
                    page: Mapping[str, Asset] | None = None):  # fmt: skip
    model, encoder = model or LanguageModel(), encoder or Encoder()
    async with serving(model, encoder) as clients:
        chat = service(*clients)
        chat.limits = limits or chat.limits
        http_door = HttpDoor(
            chat,
            Health(clients, KEY.model_fingerprint),
            keys or Keys(METRICS),
            model="tiny",
            max_model_len=4096,
            page=page,
            cors_origins=cors_origins,
            allowed_hosts=allowed_hosts,
        )

        async def app(scope, receive, send):
            response = await http_door.respond(Request(scope, receive))
            await response(scope, receive, send)

        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error"))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        door = Door(f"http://127.0.0.1:{listener.getsockname()[1]}", model, encoder, http_door)
        try:
            yield door
        finally:
            await door.raw.aclose()
            server.should_exit = True
            await task
