"""Some thousand hostile inputs where the gateway and the stages read them: all are refused by name, or taken.

`python -m benchmarks.storm hostile` sends ten thousand to a running cluster.
"""

from __future__ import annotations

import base64
import json
import random

import pytest
from google.protobuf.message import DecodeError

from benchmarks.storm.doors import LEAKS
from benchmarks.storm.mutations import VALID, hostile_image, mutated_bytes, mutated_message, mutated_text
from focusllava import user
from focusllava.v1 import focus_pb2, llm_pb2
from focusllava.wire import build_request
from services.common import wire
from services.common.errors import Code, FocusError
from services.common.media import MediaLimits, check_image, open_image
from services.common.wire import RequestSizes
from services.gateway.admission import AdmissionLimits, admit, request_id_of
from services.gateway.openai.completion import CompletionRequest
from services.gateway.openai.request import ChatCompletionRequest
from services.llm.received import Received
from tests.fakes.stages import KEY, message_for

INPUTS = 400
LIMITS = AdmissionLimits()
CHAT = build_request([user("What?", images=VALID[:2])], max_tokens=3, top_p=0.9, stop=["x"], logprobs=2, threshold=0.9)
URL = f"data:image/png;base64,{base64.b64encode(VALID[0]).decode()}"
CONTENT = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": URL}}]
BODY = {"model": "tiny", "messages": [{"role": "user", "content": CONTENT}], "max_tokens": 3, "seed": 3, "stop": ["x"],
        "n": 1, "logprobs": True, "top_logprobs": 2, "logit_bias": {"5": 1}, "focus": {"threshold": 0.9},
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}}  # fmt: skip
COMPLETION = {"model": "tiny", "prompt": ["a", [5, 6]], "max_tokens": 2, "echo": False}
GENERATE = llm_pb2.GenerateRequest(
    request_id="r", model_fingerprint=KEY.model_fingerprint, images=[message_for(KEY)],
    turns=[llm_pb2.PromptTurn(role=llm_pb2.ROLE_USER, parts=[llm_pb2.PromptPart(image_index=0)])],
    sampling=llm_pb2.SamplingParams(max_tokens=3, stop=["x"], logprobs=2), prune=llm_pb2.PruneParams(threshold=0.9),
)  # fmt: skip
RECEIVED = Received(RequestSizes(context=4096, width=4), None, 0)


def enter(request: focus_pb2.ChatRequest) -> None:
    admit(request, LIMITS, request_id_of(request))


def chat(rng: random.Random) -> None:
    if rng.random() < 0.5:
        enter(mutated_message(CHAT, rng))
    else:
        enter(focus_pb2.ChatRequest.FromString(mutated_bytes(CHAT.SerializeToString(), rng)))


def http(rng: random.Random) -> None:
    kind, body = rng.choice(((ChatCompletionRequest, BODY), (CompletionRequest, COMPLETION)))
    settings = kind.parse(mutated_text(body, rng), LIMITS.max_text_chars)
    settings.asked("r")
    for request in settings.to_chat_requests("r"):
        enter(request)


def generate(rng: random.Random) -> None:
    if rng.random() < 0.5:
        RECEIVED.read(mutated_message(GENERATE, rng))
    else:
        RECEIVED.read(llm_pb2.GenerateRequest.FromString(mutated_bytes(GENERATE.SerializeToString(), rng)))


def tensor(rng: random.Random) -> None:
    message = mutated_message(GENERATE.images[0], rng)
    message.tokens.data = mutated_bytes(message.tokens.data, rng)
    wire.tokens_from_proto(message)


def image(rng: random.Random) -> None:
    data, limits = hostile_image(rng), MediaLimits(max_pixels=10**6)
    check_image(data, limits)
    open_image(data, limits)


@pytest.mark.parametrize("read", [chat, http, generate, tensor, image])
@pytest.mark.filterwarnings("ignore")  # Pillow's, of files that are damaged
def test_hostile_inputs_are_taken_or_refused_by_name(read):
    refused = 0
    for seed in range(INPUTS):
        try:
            read(random.Random(f"{read.__name__}/{seed}"))
        except DecodeError:  # gRPC refuses these before we see them
            refused += 1
        except FocusError as error:
            refused += 1
            assert error.code is not Code.INTERNAL, f"seed {seed}: {error}"
            assert not LEAKS.search(json.dumps(str(error))), f"seed {seed}: {error}"
    assert INPUTS / 10 < refused < INPUTS, "some are as good as valid, many are not"
