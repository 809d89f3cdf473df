"""Requests to a running cluster as its clients and stages send them, and what its processes and metrics tell."""

from __future__ import annotations

import contextlib
import io
import pathlib
import re
import time
import urllib.request

import numpy as np
from PIL import Image

from focusllava.v1 import encoder_pb2, encoder_pb2_grpc, focus_pb2, focus_pb2_grpc, llm_pb2, llm_pb2_grpc
from services.common.stage_secret import SECRET_METADATA

SECRET = "stages-of-tests-answer-who-says-this"
"""What the tests' clusters share, so that a test may call a stage itself."""
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
FP32 = {stage: {"dtype": "float32"} for stage in ("encoder", "llm")}
"""Settings of the stages, whose answers are compared with fp32."""
LEAKS = re.compile(r"Traceback|File \"|\.py\b|/tmp/|/home/|site-packages|ray\.exceptions|ray::|\bpid\b|\bactor|\n")


def picture(seed: int, size: tuple[int, int] = (120, 90)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def question(image: bytes | None = None, text: str = "What is on the card?", **fields) -> focus_pb2.ChatRequest:
    parts = [focus_pb2.ChatPart(image=image)] if image is not None else []
    fields.setdefault("sampling", llm_pb2.SamplingParams(max_tokens=12, ignore_eos=True))
    turn = focus_pb2.ChatTurn(role=llm_pb2.ROLE_USER, parts=[*parts, focus_pb2.ChatPart(text=text)])
    return focus_pb2.ChatRequest(turns=[turn], **fields)


def chat(channel, request: focus_pb2.ChatRequest) -> list[focus_pb2.ChatResponse]:
    stub = focus_pb2_grpc.FocusServiceStub(channel)
    return list(stub.Chat(request, timeout=60, metadata=(("application", "gateway"),)))


def text_of(events) -> str:
    return "".join(event.token.text for event in events)


def ids_of(events) -> list[int]:
    return [token for event in events for token in event.token.token_ids]


def scrape(cluster) -> str:
    with urllib.request.urlopen(cluster.metrics_url, timeout=10) as response:
        return response.read().decode()


def gauge(cluster, name: str) -> float:
    values = re.findall(rf"^ray_{name}\{{[^\n]*\}} (\S+)$", scrape(cluster), re.M)
    return sum(map(float, values)) if values else float("nan")


def until(condition, seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.3)
    return False


def stage_metadata(application: str, secret: str = SECRET) -> tuple[tuple[str, str], ...]:
    return ("application", application), (SECRET_METADATA, secret)


def encoded(channel, fingerprint: str, image: bytes) -> encoder_pb2.CompressedVisualTokens:
    stub = encoder_pb2_grpc.EncoderServiceStub(channel)
    request = encoder_pb2.EncodeRequest(image=image, model_fingerprint=fingerprint, vision_sampler=True)
    return stub.Encode(request, timeout=60, metadata=stage_metadata("encoder")).visual_tokens


def generated(channel, fingerprint: str, *images, parts=()) -> list[llm_pb2.GenerateResponse]:
    stub = llm_pb2_grpc.LanguageModelServiceStub(channel)
    parts = parts or [llm_pb2.PromptPart(image_index=number) for number in range(len(images))]
    request = llm_pb2.GenerateRequest(
        request_id=f"direct-{time.monotonic_ns()}",
        model_fingerprint=fingerprint,
        turns=[llm_pb2.PromptTurn(role=llm_pb2.ROLE_USER, parts=[llm_pb2.PromptPart(text="what?"), *parts])],
        images=images,
        sampling=llm_pb2.SamplingParams(max_tokens=2),
    )
    return list(stub.Generate(request, timeout=60, metadata=stage_metadata("llm")))


def replica_pids(cluster, application: str) -> list[int]:
    """Processes of this cluster that Ray titled as replicas of the application."""
    return pids_titled(cluster, f"ray::ServeReplica:{application}:")


def proxy_pids(cluster) -> list[int]:
    """The process that answers on both ports."""
    return pids_titled(cluster, "ray::ProxyActor")


def pids_titled(cluster, beginning: str) -> list[int]:
    return [pid for pid, title in titles(cluster.state).items() if title.startswith(beginning)]


def pid_of(state, program: str) -> int | None:
    """The process of this cluster that runs the program of this name."""
    paths = {pid: title.split("\0")[0] for pid, title in titles(state).items()}
    return next((pid for pid, path in paths.items() if pathlib.PurePath(path).name == program), None)


def titles(state) -> dict[int, str]:
    """Each process of this cluster with its command line, in which NUL ends each word."""
    found = {}
    for pid in state.pids():
        with contextlib.suppress(OSError):
            found[pid] = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return found
