"""OpenAI's client against a real Ray: its HTTP ingress gives the answers of the gRPC one."""

from __future__ import annotations

import base64
import json
import re
import urllib.error
import urllib.request

import openai
import pytest

from tests.serving_client import LEAKS, chat, gauge, picture, question, scrape, text_of, until


@pytest.fixture(scope="module")
def client(cluster):
    with openai.OpenAI(base_url=cluster.openai_url, api_key="none", timeout=120, max_retries=0) as client:
        yield client


def messages(image: bytes, text: str = "What is on the card?") -> list[dict]:
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}},
                                         {"type": "text", "text": text}]}]  # fmt: skip


def ask(client, image: bytes, *, tokens: int = 12, **fields):
    fields = {"max_tokens": tokens, "extra_body": {"ignore_eos": True}, **fields}
    return client.chat.completions.create(model=client.models.list().data[0].id, messages=messages(image), **fields)


def test_the_answer_is_that_of_grpc_whole_and_streamed(client, channel, checkpoint):
    image = picture(101)
    events = chat(channel, question(image))
    whole = ask(client, image)
    chunks = list(ask(client, image, stream=True, stream_options={"include_usage": True}))
    usage = events[-1].finished.usage
    assert whole.model == checkpoint[0].name
    assert whole.choices[0].message.content == text_of(events)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text_of(events)
    assert whole.usage == chunks[-1].usage and whole.usage.completion_tokens == usage.completion_tokens == 12
    assert whole.choices[0].finish_reason == "length"
    assert whole.focus["images"][0]["cached"] and whole.focus["visual_tokens_kept"] == usage.visual_tokens_kept
    assert whole.focus["kv_bytes"] == usage.kv_bytes < whole.focus["kv_unpruned_bytes"]


def test_a_stream_comes_in_pieces(client):
    pieces = 0
    for chunk in ask(client, picture(102), tokens=300, stream=True):
        pieces += 1
        if chunk.choices[0].finish_reason:
            break
    assert pieces > 100


def test_a_client_that_leaves_frees_its_slot(cluster, client):
    outcomes = r"^ray_focusllava_generate_requests_total\{[^\n]*outcome=\"cancelled\"[^\n]*\} (\S+)$"

    def cancelled() -> float:
        return sum(map(float, re.findall(outcomes, scrape(cluster), re.M)))

    model = client.models.list().data[0].id
    before = cancelled()
    for _ in range(5):
        stream = ask(client, picture(103), tokens=1000, stream=True)
        next(iter(stream))
        stream.close()
    assert until(lambda: cancelled() > before), "the llm stage saw none of five streams cancelled"
    before = cancelled()
    for _ in range(5):
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).chat.completions.create(
                model=model, messages=messages(picture(103)), max_tokens=1000, extra_body={"ignore_eos": True}
            )
    assert until(lambda: cancelled() > before), "the llm stage saw none of five whole answers cancelled"
    assert until(lambda: gauge(cluster, "focusllava_running_requests") == 0)
    assert until(lambda: gauge(cluster, "focusllava_kv_blocks_used") == 0)


def test_the_request_id_is_there_once(client):
    asked = client.chat.completions.with_raw_response
    model = client.models.list().data[0].id
    for headers, expected in (({"x-request-id": "mine-1"}, "mine-1"), ({}, None)):
        answer = asked.create(model=model, messages=messages(picture(106)), max_tokens=2, extra_headers=headers)
        (found,) = answer.headers.get_list("x-request-id")
        assert answer.parse().id == f"chatcmpl-{found}" and expected in (found, None)


def test_errors_are_openais(client):
    with pytest.raises(openai.BadRequestError, match="truncated or damaged") as caught:
        ask(client, picture(105)[:2000])
    assert caught.value.param == "messages[0].content[0].image_url.url"
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, picture(105), extra_body={"focus": {"threshold": 2}})
    assert caught.value.param == "focus.threshold"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4o", messages=messages(picture(105)))
    assert ask(client, picture(105)).usage.completion_tokens == 12


@pytest.mark.parametrize("path", ["/", "/v1", "/encoder", "/llm", "/encoder/v1/chat/completions", "/docs"])
def test_nothing_else_is_there_and_nothing_leaks(cluster, path):
    url = cluster.openai_url.removesuffix("/v1") + path
    for body in (None, b"{}"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, body, timeout=30)
        text = caught.value.read().decode()
        assert caught.value.code == 404, (path, caught.value.code, text)
        assert not LEAKS.search(text), text
        assert text == "this stage speaks gRPC" or json.loads(text)["error"]["message"]
