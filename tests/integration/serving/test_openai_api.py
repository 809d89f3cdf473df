"""OpenAI's client against a real Ray: its HTTP ingress gives the answers of the gRPC one."""

from __future__ import annotations

import base64
import itertools
import json
import re
import urllib.error
import urllib.request

import openai
import pytest
from transformers import AutoTokenizer

from focusllava.v1 import llm_pb2
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


def test_samplers_trained_on_an_import_are_on_in_what_is_served_until_a_request_turns_them_off(client, channel):
    """An import has the vision-guided sampler off, and its export after training has it on."""
    image = picture(5, (56, 56))
    for vision, text in itertools.product((True, False), repeat=2):
        request = question(image, vision_sampler_off=not vision, prune=llm_pb2.PruneParams(off=not text))
        usage = chat(channel, request)[-1].finished.usage
        fields = {"vision_sampler": vision, "text_sampler": text} if not (vision and text) else {}
        said = ask(client, image, extra_body={"focus": fields, "ignore_eos": True}).focus
        counts = usage.visual_tokens_uncompressed, usage.visual_tokens_sampled, usage.visual_tokens_kept
        uncompressed, sampled, kept = counts
        assert (uncompressed, sampled < uncompressed, kept < sampled) == (88, vision, text), (fields, counts)
        assert counts == tuple(said[f"visual_tokens_{name}"] for name in ("uncompressed", "sampled", "kept"))


def test_a_stream_comes_in_pieces(client):
    pieces = 0
    for chunk in ask(client, picture(102), tokens=300, stream=True):
        pieces += 1
        if chunk.choices[0].finish_reason:
            break
    assert pieces > 100


def test_a_client_that_leaves_frees_its_kv_cache(cluster, client):
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
    assert until(lambda: gauge(cluster, "focusllava_kv_pages_used") == 0)


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


@pytest.mark.parametrize("path", ["/page", "/v1", "/encoder", "/llm", "/encoder/v1/chat/completions", "/docs"])
def test_nothing_else_is_there_and_nothing_leaks(cluster, path):
    url = cluster.openai_url.removesuffix("/v1") + path
    for body in (None, b"{}"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, body, timeout=30)
        text = caught.value.read().decode()
        assert caught.value.code == 404, (path, caught.value.code, text)
        assert not LEAKS.search(text), text
        assert json.loads(text)["error"]["message"]


def test_both_stages_are_there(cluster):
    url = cluster.openai_url.removesuffix("/v1") + "/health"
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=30) as answer:
        assert json.loads(answer.read()) == {"status": "ok"}
    head = urllib.request.Request(url, method="HEAD")
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(head, timeout=30) as answer:
        assert (answer.status, answer.read(), answer.headers["content-length"]) == (200, b"", "15")


def test_a_text_completion(client, checkpoint):
    model = client.models.list().data[0].id
    fields = {"model": model, "prompt": "What is on", "max_tokens": 9, "extra_body": {"ignore_eos": True}}
    options = {"include_usage": True, "continuous_usage_stats": True}
    whole = client.completions.create(**fields, logprobs=2)
    chunks = list(client.completions.create(**fields, stream=True, stream_options=options))
    tokens = AutoTokenizer.from_pretrained(checkpoint[0])(fields["prompt"])["input_ids"]
    by_ids = client.completions.create(**{**fields, "prompt": tokens})
    assert whole.usage.prompt_tokens == len(tokens) and whole.usage.completion_tokens == 9
    assert whole.choices[0].text == "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert by_ids.choices[0].text == whole.choices[0].text and by_ids.usage == whole.usage == chunks[-1].usage
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {len(tokens)}
    assert len(whole.choices[0].logprobs.tokens) == len(whole.choices[0].logprobs.text_offset) == 9
    assert all(len(top) in (2, 3) for top in whole.choices[0].logprobs.top_logprobs)


SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_that_must_match(client, temperature):
    formatted = {"type": "json_schema", "json_schema": {"name": "card", "schema": SCHEMA, "strict": True}}
    common = {"tokens": 200, "temperature": temperature, "seed": 5}
    card = json.loads(ask(client, picture(107), response_format=formatted, **common).choices[0].message.content)
    assert card.keys() == {"colour", "count"} and card["colour"] in ("red", "blue") and 0 <= card["count"] <= 9
    said = ask(client, picture(107), extra_body={"guided_choice": ["yes", "no"]}, **common)
    assert said.choices[0].message.content in ("yes", "no") and said.choices[0].finish_reason == "stop"
    said = ask(client, picture(107), extra_body={"structured_outputs": {"regex": "[a-c]{3}"}}, **common)
    assert re.fullmatch("[a-c]{3}", said.choices[0].message.content)
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, picture(107), extra_body={"guided_json": {"type": "no such type"}})
    assert caught.value.param == "guided_json"


def test_settings_that_vllm_has_too(client):
    plain = ask(client, picture(108), logprobs=True).choices[0]
    text, stop = plain.message.content, plain.message.content[2:4]
    assert stop and b"".join(bytes(entry.bytes) for entry in plain.logprobs.content).decode(errors="replace")
    stopped = ask(client, picture(108), extra_body={"ignore_eos": True, "stop": [stop]})
    assert stopped.choices[0].message.content == text[: text.find(stop)]
    kept = ask(client, picture(108),
               extra_body={"ignore_eos": True, "stop": [stop], "include_stop_str_in_output": True})  # fmt: skip
    assert kept.choices[0].message.content == text[: text.find(stop)] + stop
    alone = [{"role": "user", "content": messages(picture(108))[0]["content"][:1]}]
    said = client.chat.completions.create(model=client.models.list().data[0].id, messages=alone, max_tokens=3)
    assert said.focus["visual_tokens_kept"] == said.focus["visual_tokens_sampled"]  # nothing is pruned by no words


def test_a_conversation_in_every_order(client):
    model = client.models.list().data[0].id
    system, user = {"role": "system", "content": "Be short."}, messages(picture(109))[0]
    begun = [user, {"role": "assistant", "content": "It is"}]
    again = {"role": "user", "content": "Why?"}
    for conversation in ([system, system, user], [user, system], [system, *begun, system, again], begun):
        said = client.chat.completions.create(model=model, messages=conversation, max_tokens=2)
        assert said.usage.completion_tokens >= 1
    open_ended = client.chat.completions.create(
        model=model, messages=begun, max_tokens=4, extra_body={"continue_final_message": True, "ignore_eos": True}
    )
    assert open_ended.usage.completion_tokens == 4
