"""Connections that do not go on, against a real uvicorn with the proxy's bounded protocol."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time

import httpx2
import openai
import pytest
import uvicorn
from ray.serve._private.common import DeploymentID
from ray.serve._private.http_util import (
    convert_object_to_asgi_messages,
    get_http_response_status,
    send_http_response_on_exception,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from cluster import http_bounds
from cluster.http_bounds import BoundedHttp, bound_http

HEADERS = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"


class Application:
    """Answers with the length of the body, as Ray's application does once a replica has it."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.silent = False
        self.refusing: Exception | None = None
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def __call__(self, scope, receive, send) -> None:
        message = await receive()
        assert not message["more_body"], "a request came in parts"
        self.bodies.append(message["body"])
        await self.go_on.wait()
        if self.silent:
            return
        if scope["path"] == "*":  # what Ray's proxy sends where no application has the path
            for message in convert_object_to_asgi_messages("Path '*' not found. Ping http://...", status_code=404):
                await send(message)
            return
        if self.refusing is not None:  # what Ray's proxy sends where it refuses a request
            status = get_http_response_status(self.refusing, 600, "the-id")
            for refusal in send_http_response_on_exception(status, response_started=False):
                if refusal["type"] == "http.response.start":
                    refusal["headers"].append((b"x-request-id", b"mine"))
                await send(refusal)
            return
        content = str(len(message["body"])).encode()
        headers = [(b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(http_bounds, "HEADERS_S", 0.3)
    monkeypatch.setattr(http_bounds, "BODY_PIECE_S", 0.3)
    monkeypatch.setattr(http_bounds, "BODY_S", 1.0)


@contextlib.asynccontextmanager
async def serving(monkeypatch):
    """The application, and the port it answers on."""
    monkeypatch.setattr(uvicorn.config, "HTTP_PROTOCOLS", dict(uvicorn.config.HTTP_PROTOCOLS))
    bound_http()
    application = Application()
    server = uvicorn.Server(uvicorn.Config(application, port=0, lifespan="off", log_config=None, access_log=False))
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield application, server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        await task
        assert not BoundedHttp.waiting and not BoundedHttp.body_bytes


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")).split()[1])
    return int(head.split()[1]), await reader.readexactly(length)


async def test_a_request_in_pieces_reaches_the_application_whole(monkeypatch):
    async with serving(monkeypatch) as (application, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for body in (b"x" * 300_000, b"", b"yz"):  # on one connection
            writer.write(HEADERS + b"content-length: %d\r\n\r\n" % len(body))
            for at in range(0, len(body), 100_000):
                writer.write(body[at : at + 100_000])
                await writer.drain()
                await asyncio.sleep(0.01)
            assert await read_answer(reader) == (200, str(len(body)).encode())
        assert application.bodies == [b"x" * 300_000, b"", b"yz"]
        writer.close()


@pytest.mark.parametrize("sent", [b"", b"POST /v1", HEADERS])
async def test_headers_that_do_not_come_end_the_connection(monkeypatch, quick, sent):
    async with serving(monkeypatch) as (application, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        assert await asyncio.wait_for(reader.read(), 5) == b""
        assert not application.bodies
        writer.close()


async def test_a_header_a_moment_is_not_enough(monkeypatch, quick):
    async with serving(monkeypatch) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEADERS)
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while not reader.at_eof() and time.monotonic() - began < 5:
                writer.write(b"x-more: 1\r\n")
                await writer.drain()
                await asyncio.sleep(0.05)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(1), 0.01)
        assert time.monotonic() - began < 3
        writer.close()


async def test_the_second_request_s_headers_have_their_time_too(monkeypatch, quick):
    async with serving(monkeypatch) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEADERS + b"content-length: 1\r\n\r\nx")
        assert (await read_answer(reader))[0] == 200
        await asyncio.sleep(0.5)  # an idle connection is kept
        writer.write(HEADERS)
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()


@pytest.mark.parametrize("pause_s", [10, 0.1])
async def test_a_body_that_does_not_come_is_refused_and_no_application_hears_of_it(monkeypatch, quick, pause_s):
    async with serving(monkeypatch) as (application, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEADERS + b"content-length: 1000\r\n\r\n")

        async def drip() -> None:
            while True:
                writer.write(b"{")
                await asyncio.sleep(pause_s)

        dripping = asyncio.create_task(drip())
        status, body = await asyncio.wait_for(read_answer(reader), 5)
        dripping.cancel()
        assert (status, json.loads(body)["error"]["param"]) == (408, "body")
        assert not application.bodies
        writer.close()


def test_the_bound_of_connections_leaves_files_for_the_rest(monkeypatch):
    for soft, most in ((256, 128), (1024, 512), (65_536, 1000), (-1, 1000)):
        monkeypatch.setattr(http_bounds.resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert http_bounds.most_connections() == most


async def test_a_body_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(http_bounds, "MOST_BODY_BYTES", 1000)
    async with serving(monkeypatch) as (application, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEADERS + b"content-length: 1001\r\n\r\n" + b"x" * 1001)
        status, body = await read_answer(reader)
        assert (status, json.loads(body)["error"]["message"]) == (413, "body: has more than 1000 bytes")
        assert not application.bodies
        writer.close()


async def test_a_replica_that_is_lost_is_503_with_a_reason(monkeypatch):
    async with serving(monkeypatch) as (application, port):
        application.silent = True
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEADERS + b"content-length: 1\r\n\r\nx")
        status, body = await read_answer(reader)
        assert status == 503 and json.loads(body)["error"]["type"] == "server_error"
        writer.close()


@pytest.mark.parametrize(
    "refusing, status, kind, says",
    [
        (BackPressureError(64, 64), 429, "rate_limit_error", "the server is full; try again later"),
        (BackPressureError(64, 64, status_code=429), 429, "rate_limit_error", "the server is full; try again later"),
        (
            DeploymentUnavailableError(DeploymentID("Gateway", "gateway")),
            503,
            "server_error",
            "no replica that is ready",
        ),
        (TimeoutError(), 408, "invalid_request_error", "request_timeout_s"),
    ],
)
async def test_what_ray_refuses_is_an_error_as_openais_clients_know_it(monkeypatch, refusing, status, kind, says):
    async with serving(monkeypatch) as (application, port):
        application.refusing = refusing
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            for _ in range(2):  # on one connection
                answer = await client.post("/v1/chat/completions", content=b"{}")
                error = answer.json()["error"]
                assert (answer.status_code, error["type"]) == (status, kind) and says in error["message"]
                assert "queued" not in answer.text and "the-id" not in answer.text
                assert answer.headers["x-request-id"] == "mine"
                assert answer.headers.get("retry-after") == (None if status == 408 else "1")
                assert "connection" not in answer.headers
            rays_own = await client.get("/-/healthz")
            assert rays_own.headers["content-type"].startswith("text/plain")


async def test_a_path_that_no_application_has_is_a_404_of_openais(monkeypatch):
    async with serving(monkeypatch) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n")
        status, body = await asyncio.wait_for(read_answer(reader), 5)
        writer.close()
    error = json.loads(body)["error"]
    assert (status, error["type"]) == (404, "not_found_error") and error["message"].startswith("nothing is here")


async def test_a_client_of_openais_asks_a_full_server_again(monkeypatch):
    async with serving(monkeypatch) as (application, port):
        application.refusing = BackPressureError(64, 64)
        client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=1)
        with pytest.raises(openai.RateLimitError) as caught:
            await client.models.list()
        assert caught.value.code == "rate_limit_exceeded" and len(application.bodies) == 2
        await client.close()


async def test_bodies_whose_answers_have_not_begun_count_and_what_is_beyond_is_refused(monkeypatch):
    monkeypatch.setattr(http_bounds, "MOST_BODIES_BYTES", 1_000_000)
    async with serving(monkeypatch) as (application, port):
        application.go_on.clear()
        waiting = []
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HEADERS + b"content-length: 300000\r\n\r\n" + b"x" * 300_000)
            waiting.append((reader, writer))
        while len(application.bodies) < 3:
            await asyncio.sleep(0.01)
        assert BoundedHttp.body_bytes == 900_000
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEADERS + b"content-length: 300000\r\n\r\n" + b"x" * 300_000)
        status, body = await asyncio.wait_for(read_answer(reader), 5)
        assert (status, json.loads(body)["error"]["code"]) == (429, "rate_limit_exceeded")
        writer.close()
        application.go_on.set()
        for reader, writer in waiting:
            assert await asyncio.wait_for(read_answer(reader), 5) == (200, b"300000")
            writer.close()
        assert BoundedHttp.body_bytes == 0


async def test_where_connections_are_too_many_the_longest_wait_makes_room(monkeypatch):
    monkeypatch.setattr(http_bounds, "MOST_CONNECTIONS", 20)
    async with serving(monkeypatch) as (_, port):
        half = [await asyncio.open_connection("127.0.0.1", port) for _ in range(60)]
        for _, writer in half:
            with contextlib.suppress(ConnectionError):
                writer.write(HEADERS)
        for _ in range(5):  # each comes through
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HEADERS + b"content-length: 2\r\n\r\nok")
            assert await asyncio.wait_for(read_answer(reader), 5) == (200, b"2")
            writer.close()
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(half[0][0].read(), 5) == b""
        for _, writer in half:
            writer.close()


async def test_where_bodies_are_too_many_the_longest_wait_makes_room(monkeypatch):
    monkeypatch.setattr(http_bounds, "MOST_BODIES_BYTES", 1_000_000)
    async with serving(monkeypatch) as (_, port):
        half = [await asyncio.open_connection("127.0.0.1", port) for _ in range(8)]
        for _, writer in half:
            writer.write(HEADERS + b"content-length: 300001\r\n\r\n" + b"x" * 300_000)
            await writer.drain()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEADERS + b"content-length: 300000\r\n\r\n" + b"x" * 300_000)
        assert await asyncio.wait_for(read_answer(reader), 5) == (200, b"300000")
        assert BoundedHttp.body_bytes <= 1_000_000
        writer.close()
        for _, writer in half:
            writer.close()
