"""Thousands of hostile inputs at both public doors and at the stages' own ports: nothing crashes, nothing is told.

Protobufs, tensors, JSON, headers, metadata, images and bytes on a socket: mutations of valid ones and hand-made ones,
by a seed, so that `--only CLASS --seed N --inputs 1` asks one again. Each may be answered or refused; INTERNAL, a leak
of internals, a lost process or no ending at all is a fault.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import re
import urllib.parse
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
import grpc.aio
import httpx2

from benchmarks.clusters import ONE_REPLICA
from benchmarks.measure import print_table
from benchmarks.storm.doors import LEAKS
from benchmarks.storm.mutations import (
    VALID,
    hostile_headers,
    hostile_http,
    hostile_image,
    mutated_bytes,
    mutated_message,
    mutated_text,
)
from benchmarks.storm.stage_ports import stage_ports
from benchmarks.storm.vitals import replicas, wait_until_idle
from cluster.local import LocalCluster
from focusllava import user
from focusllava.connection import CHANNEL_OPTIONS, fixed_metadata
from focusllava.v1 import encoder_pb2, encoder_pb2_grpc, focus_pb2, llm_pb2
from focusllava.wire import build_request
from services.checkpoint.store import fingerprint
from services.common.stage_secret import SECRET_METADATA

CHAT, ENCODE = "/focusllava.v1.FocusService/Chat", "/focusllava.v1.EncoderService/Encode"
GENERATE = "/focusllava.v1.LanguageModelService/Generate"
TIMEOUT_S, AT_ONCE = 180.0, 16
WRONG = {"INTERNAL", "UNKNOWN", "DATA_LOSS", "DEADLINE_EXCEEDED", "UNAVAILABLE", "ABORTED"}
"""Statuses that no input may cause. A deadline that an input itself sets is judged by its metadata."""

Said = tuple[str, str]
"""A status, and the message beside it."""


class Targets:
    """The ports of a cluster, and valid requests for each; belongs into one event loop."""

    def __init__(self, cluster: LocalCluster):
        self._cluster = cluster
        self._gateway = grpc.aio.insecure_channel(cluster.grpc_address, options=CHANNEL_OPTIONS)
        self._http = httpx2.AsyncClient(base_url=cluster.openai_url, timeout=TIMEOUT_S, trust_env=False)

    async def prepare(self) -> None:
        """Learns the stages' ports as a gateway does, and has an image encoded."""
        self._stages = {
            stage: (grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS), ((SECRET_METADATA, secret),))
            for stage, (address, secret) in stage_ports(self._cluster).items()
        }
        mark = fingerprint(self._cluster.state.checkpoint)
        self.encode = encoder_pb2.EncodeRequest(image=VALID[0], model_fingerprint=mark, vision_sampler=True)
        channel, metadata = self._stages["encoder"]
        stub: Any = encoder_pb2_grpc.EncoderServiceStub(channel)  # type: ignore[no-untyped-call]
        tokens = (await stub.Encode(self.encode, metadata=metadata)).visual_tokens
        words = [llm_pb2.PromptPart(image_index=0), llm_pb2.PromptPart(text="What is it?")]
        sampling = llm_pb2.SamplingParams(max_tokens=3, temperature=0.5, seed=1, top_k=5, stop=["x"], logprobs=2)
        self.generate = llm_pb2.GenerateRequest(
            request_id="storm", model_fingerprint=mark, images=[tokens], sampling=sampling,
            turns=[llm_pb2.PromptTurn(role=llm_pb2.ROLE_USER, parts=words)], prune=llm_pb2.PruneParams(threshold=0.9),
        )  # fmt: skip
        self.chat = build_request([user("What is it?", images=[VALID[0], VALID[1]])], max_tokens=3, temperature=0.5,
                                  top_p=0.9, stop=["x"], logprobs=2, threshold=0.9, json_object=True)  # fmt: skip
        url = f"data:image/png;base64,{base64.b64encode(VALID[0]).decode()}"
        content = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": url}}]
        model = (await self._http.get("/models")).json()["data"][0]["id"]
        self.body = {
            "model": model, "messages": [{"role": "system", "content": "Be brief."}, {"role": "user",
            "content": content}],
            "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["x"], "n": 1, "stream": False,
            "logprobs": True, "top_logprobs": 2, "logit_bias": {"5": 1}, "focus": {"threshold": 0.9},
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
        }  # fmt: skip

    async def close(self) -> None:
        await self._http.aclose()
        for channel in (self._gateway, *(channel for channel, _ in self._stages.values())):
            await channel.close()

    async def call(self, method: str, data: bytes, stage: str = "", metadata: Mapping[str, str] | None = None) -> Said:
        """Bytes as a request to a method: of the gateway, or where a stage is named at that stage's own port."""
        channel, own = self._stages[stage] if stage else (self._gateway, fixed_metadata("gateway", None))
        more = metadata or {}
        said = (*(pair for pair in own if pair[0] not in more), *more.items())
        try:
            if method == ENCODE:
                await channel.unary_unary(method)(data, timeout=TIMEOUT_S, metadata=said)
            else:
                async for event in channel.unary_stream(method)(data, timeout=TIMEOUT_S, metadata=said):
                    answer = (focus_pb2.ChatResponse if method == CHAT else llm_pb2.GenerateResponse).FromString(event)
                    if answer.HasField("error"):
                        return answer.error.code, answer.error.message
        except grpc.RpcError as error:
            return error.code().name, error.details() or ""
        return "OK", ""

    async def post(
        self, content: bytes, path: str = "/chat/completions", headers: dict[str, str] | None = None
    ) -> Said:
        """A body over HTTP."""
        headers = {"content-type": "application/json", **(headers or {})}
        try:
            answer = await self._http.post(path, content=content, headers=headers)
        except httpx2.TimeoutException:
            return "no end", ""
        except (httpx2.HTTPError, UnicodeError, ValueError):  # the client itself refuses to send or to read it
            return "closed", ""
        return _judged_http(answer.status_code, answer.text)

    async def raw(self, data: bytes) -> Said:
        """Bytes at the HTTP port."""
        place = urllib.parse.urlsplit(self._cluster.openai_url)
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        try:
            writer.write(data)
            writer.write_eof()
            answer = await asyncio.wait_for(reader.read(2**20), TIMEOUT_S)
        except TimeoutError:
            return "no end", ""
        except OSError:
            return "closed", ""
        finally:
            writer.close()
        found = re.match(rb"HTTP/1\.\d (\d+)", answer)
        return (
            _judged_http(int(found[1]), answer.partition(b"\r\n\r\n")[2].decode(errors="replace"))
            if found
            else ("closed", "")
        )


def _judged_http(status: int, text: str) -> Said:
    try:
        message = str(json.loads(text)["error"]["message"]) if status >= 400 else ""
    except (ValueError, KeyError, TypeError):
        message = text[:2000].rstrip("\n")
    return str(status), message


Ask = Callable[[Targets, random.Random], Awaitable[Said]]
CLASSES: dict[str, Ask] = {
    "gateway: protobuf bytes": lambda t, r: t.call(CHAT, mutated_bytes(t.chat.SerializeToString(), r)),
    "gateway: protobuf fields": lambda t, r: t.call(CHAT, mutated_message(t.chat, r).SerializeToString()),
    "gateway: images": lambda t, r: t.call(
        CHAT, build_request([user("What?", images=hostile_image(r))], max_tokens=2).SerializeToString()
    ),
    "gateway: metadata": lambda t, r: t.call(CHAT, t.chat.SerializeToString(), metadata=_ascii(hostile_headers(r))),
    "http: JSON": lambda t, r: t.post(mutated_text(t.body, r)),
    "http: images": lambda t, r: t.post(_with_image(t.body, hostile_image(r))),
    "http: headers": lambda t, r: t.post(json.dumps(t.body).encode(), headers=hostile_headers(r)),
    "http: completions": lambda t, r: t.post(
        mutated_text({"model": t.body["model"], "prompt": ["a", [5, 6]], "max_tokens": 2, "echo": False}, r),
        "/completions"
    ),
    "http: bytes": lambda t, r: t.raw(hostile_http(r)),
    "encoder: protobuf bytes": lambda t, r: t.call(ENCODE, mutated_bytes(t.encode.SerializeToString(), r), "encoder"),
    "encoder: protobuf fields": lambda t, r: t.call(ENCODE, mutated_message(t.encode, r).SerializeToString(),
    "encoder"),
    "encoder: images": lambda t, r: t.call(
        ENCODE, encoder_pb2.EncodeRequest(image=hostile_image(r), model_fingerprint=t.encode.model_fingerprint,
                                          vision_sampler=r.random() < 0.5).SerializeToString(), "encoder",
    ),
    "llm: protobuf bytes": lambda t, r: t.call(GENERATE, mutated_bytes(t.generate.SerializeToString(), r), "llm"),
    "llm: protobuf fields": lambda t, r: t.call(GENERATE, mutated_message(t.generate, r).SerializeToString(), "llm"),
    "llm: tensors": lambda t, r: t.call(GENERATE, _with_tensor(t.generate, r).SerializeToString(), "llm"),
    "shared port, encoder": lambda t, r: t.call(
        ENCODE, mutated_bytes(t.encode.SerializeToString(), r), metadata={"application": "encoder"}
    ),
}  # fmt: skip
"""What is sent where."""


def _ascii(headers: dict[str, str]) -> dict[str, str]:
    """Metadata that gRPC sends: a name that it keeps for itself is not ours to say."""
    return {name: value for name, value in headers.items() if name not in ("host", "content-type", "te")}


def _with_image(body: dict[str, Any], image: bytes) -> bytes:
    changed = json.loads(json.dumps(body))
    changed["messages"][1]["content"][1]["image_url"]["url"] = (
        f"data:image/png;base64,{base64.b64encode(image).decode()}"
    )
    return json.dumps(changed).encode()


def _with_tensor(request: llm_pb2.GenerateRequest, rng: random.Random) -> llm_pb2.GenerateRequest:
    changed = llm_pb2.GenerateRequest()
    changed.CopyFrom(request)
    image = changed.images[0]
    tensor = mutated_message(image.tokens, rng)
    image.tokens.CopyFrom(tensor)
    if rng.random() < 0.5:
        image.tokens.data = mutated_bytes(image.tokens.data, rng)
    if rng.random() < 0.3:
        image.CopyFrom(mutated_message(image, rng))
    return changed


def fault_of(said: Said, metadata_decides: bool) -> str | None:
    """What is wrong with an ending. metadata_decides: the input may have set a deadline, or named another service."""
    status, message = said
    if LEAKS.search(message):
        return f"{status} that tells internals"
    if status in WRONG and not (metadata_decides and status in ("DEADLINE_EXCEEDED", "UNAVAILABLE")):
        return status
    if status == "no end" or (status.isdecimal() and int(status) >= 500 and not (metadata_decides and status == "504")):
        return status
    return None


async def ask_all(cluster: LocalCluster, options: argparse.Namespace) -> list[str]:
    targets, place = Targets(cluster), asyncio.Semaphore(AT_ONCE)
    await targets.prepare()
    names = [name for name in CLASSES if not options.only or options.only in name]
    endings: dict[str, Counter[str]] = {name: Counter() for name in names}
    faults: dict[str, str] = {}

    async def one(number: int) -> None:
        name = names[number % len(names)]
        async with place:
            said = await CLASSES[name](targets, random.Random(f"{name}/{options.seed + number}"))
        endings[name][said[0]] += 1
        if fault := fault_of(said, "metadata" in name or "headers" in name):
            faults.setdefault(
                f"{name}: {fault}: {re.sub(r'[0-9a-f]{8,}', '...', said[1])[:300]}", str(options.seed + number)
            )
        if sum(map(Counter.total, endings.values())) % 500 == 0:
            print(f"\rhostile: {sum(map(Counter.total, endings.values()))} sent", end="", flush=True)

    await asyncio.gather(*map(one, range(options.inputs)))
    print("\r" + " " * 40 + "\r", end="")
    alive = await targets.call(CHAT, build_request([user("What?", images=VALID[0])], max_tokens=2).SerializeToString())
    await targets.close()
    print_table(("class", "sent", "endings"), [
        [name, counts.total(), ", ".join(f"{count} {status}" for status, count in counts.most_common())]
        for name, counts in endings.items()
    ])  # fmt: skip
    found = [f"{said} (seed {seed})" for said, seed in faults.items()]
    return found + ([] if alive == ("OK", "") else [f"a good request afterwards: {alive}"])


def run(options: argparse.Namespace) -> list[str]:
    """Prints what happened; returns what should not have."""
    names = ("gateway", "encoder", "llm")
    with LocalCluster(grpc_port=0, timeout_s=400, options=dict.fromkeys(names, ONE_REPLICA)) as cluster:
        cluster.start()
        return against(cluster, options)


def against(cluster: LocalCluster, options: argparse.Namespace) -> list[str]:
    """Does what `run` does, to a cluster that runs."""
    before = replicas(cluster)
    faults = asyncio.run(ask_all(cluster, options))
    lost = {role for pid, role in before.items() if pid not in replicas(cluster)}
    left = wait_until_idle(cluster)
    faults += [f"a process of {role} was lost" for role in lost]
    return faults + [f"at the end {title} is {amount:g}" for title, amount in left.items()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="a class, or a part of its name")
