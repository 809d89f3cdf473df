"""A gateway that follows a script over a real socket: the peer for the client's retry, deadline and error paths."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc

from focusllava import RetryPolicy
from focusllava.v1 import error_pb2, focus_pb2, focus_pb2_grpc, llm_pb2

QUICK = RetryPolicy(attempts=3, first_delay_s=0.01)

USAGE = llm_pb2.Usage(
    prompt_tokens=120,
    completion_tokens=3,
    visual_tokens_uncompressed=100,
    visual_tokens_sampled=50,
    visual_tokens_kept=20,
    prune_layer=2,
    num_layers=6,
    converted_share_percent=30.0,
    kv_bytes=2048,
    kv_unpruned_bytes=4096,
    time_to_first_token_ms=12.5,
)
Script = Callable[[focus_pb2.ChatRequest, grpc.ServicerContext], Iterator[focus_pb2.ChatResponse]]


def started(cached: bool = False, images: int = 1) -> focus_pb2.ChatResponse:
    image = focus_pb2.ImageInfo(
        content_hash="ab" * 32,
        cached=cached,
        visual_tokens_uncompressed=100,
        visual_tokens_sampled=50,
        notes=["animated image: first frame used"],
    )
    return focus_pb2.ChatResponse(started=focus_pb2.ChatStarted(request_id="r1", images=[image] * images))


def token(text: str) -> focus_pb2.ChatResponse:
    return focus_pb2.ChatResponse(token=llm_pb2.Token(text=text, token_ids=[1]))


def likely(text: str) -> focus_pb2.ChatResponse:
    """A token with its log probability and those of two alternatives."""
    chosen, other = (
        llm_pb2.TokenLogprob(token_id=1, logprob=-0.25, text=text),
        llm_pb2.TokenLogprob(token_id=2, logprob=-1.5, text="z"),
    )
    logprobs = llm_pb2.TokenLogprobs(chosen=chosen, top=[chosen, other])
    return focus_pb2.ChatResponse(token=llm_pb2.Token(text=text, token_ids=[1], logprobs=[logprobs]))


def finished() -> focus_pb2.ChatResponse:
    return focus_pb2.ChatResponse(finished=llm_pb2.Finished(reason=llm_pb2.FINISH_REASON_STOP, usage=USAGE))


def failed(code: str, message: str) -> focus_pb2.ChatResponse:
    return focus_pb2.ChatResponse(error=error_pb2.StreamError(code=code, message=message))


class ScriptedGateway(focus_pb2_grpc.FocusServiceServicer):
    """Plays `script` for each Chat call and remembers what it was sent."""

    def __init__(self, credentials: grpc.ServerCredentials | None = None) -> None:
        """With credentials it speaks TLS, for `localhost`."""
        self.script: Script = self.answer
        self.requests: list[focus_pb2.ChatRequest] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.cancelled = threading.Event()
        self._server = self._new_server()
        if credentials:
            self.address = f"localhost:{self._server.add_secure_port('localhost:0', credentials)}"
        else:
            self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def _new_server(self) -> grpc.Server:
        server = grpc.server(
            futures.ThreadPoolExecutor(max_workers=8), options=[("grpc.max_receive_message_length", 64 * 2**20)]
        )
        focus_pb2_grpc.add_FocusServiceServicer_to_server(self, server)
        return server

    def stop(self) -> None:
        self._server.stop(grace=0).wait()

    def start_again(self) -> None:
        """Starts a server again at the same address, without TLS."""
        self._server = self._new_server()
        self._server.add_insecure_port(self.address)
        self._server.start()

    def Chat(self, request: focus_pb2.ChatRequest, context: grpc.ServicerContext) -> Iterator[focus_pb2.ChatResponse]:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        yield from self.script(request, context)

    def GetModelInfo(
        self, request: focus_pb2.GetModelInfoRequest, context: grpc.ServicerContext
    ) -> focus_pb2.GetModelInfoResponse:
        return focus_pb2.GetModelInfoResponse(name="focusllava-tiny", num_layers=6, prune_threshold=0.85, max_images=4)

    def answer(self, request: focus_pb2.ChatRequest, context: grpc.ServicerContext) -> Iterator[focus_pb2.ChatResponse]:
        yield started()
        for text in ("a ", "", "red ", "café"):
            yield token(text)
        yield finished()

    def endless(
        self, request: focus_pb2.ChatRequest, context: grpc.ServicerContext
    ) -> Iterator[focus_pb2.ChatResponse]:
        """Tokens until the client leaves."""
        context.add_callback(self.cancelled.set)  # it can end in no other way
        yield started()
        while context.is_active():
            yield token("x")
            time.sleep(0.01)

    def refusing(self, code: grpc.StatusCode, details: str, times: int = 10**6) -> Script:
        """Refuses so many calls before any event, then answers."""
        left = times

        def script(request: focus_pb2.ChatRequest, context: grpc.ServicerContext) -> Iterator[focus_pb2.ChatResponse]:
            nonlocal left
            if left > 0:
                left -= 1
                context.abort(code, details)
            yield from self.answer(request, context)

        return script
