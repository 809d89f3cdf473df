"""`focusllava import` and `focusllava serve`, as a user types them, on a real language model: SmolLM2-135M-Instruct.

`make smollm` installs what this needs and runs it.
"""

from __future__ import annotations

import base64
import io
import os
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import openai
import pytest
import torch
from PIL import Image

from focusllava import FocusClient
from tests.smollm.checkpoint import load_text_model, save_llava_next

COMMAND = pathlib.Path(sys.executable).parent / "focusllava"
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain in three sentences why the sky is blue.",
    'Translate "Good morning, how are you?" into French and German.',
    "def fibonacci(n):",
    "Was ist größer: ½ oder ⅓? 🤔",
)
TOKENS = 60


@dataclass(frozen=True, kw_only=True)
class Served:
    """The addresses of what `focusllava serve` printed."""

    grpc: str
    openai: str


@pytest.fixture(scope="module")
def text_model():
    return load_text_model()


@pytest.fixture(scope="module")
def expected(text_model) -> dict[str, list[int]]:
    """Token ids of each answer, the end-of-turn token included, by transformers' greedy search in fp32."""
    model, tokenizer = text_model
    found = {}
    for question in QUESTIONS:
        turns = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            answer = model.generate(**prompt, max_new_tokens=TOKENS, do_sample=False)
        found[question] = answer[0, prompt["input_ids"].shape[1] :].tolist()
    return found


@pytest.fixture(scope="module")
def served(tmp_path_factory, text_model, expected) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("smollm")
    save_llava_next(folder / "hub", *text_model)
    imported = subprocess.run([COMMAND, "import", folder / "hub", folder / "smollm"], capture_output=True, text=True)
    assert imported.returncode == 0, imported.stdout + imported.stderr
    print(imported.stdout)
    with open(folder / "log", "w+b") as log:
        # float32 for the sake of the comparison; all else is what a user gets.
        process = subprocess.Popen(
            [COMMAND, "serve", folder / "smollm", "--grpc-port", "0", "--dtype", "float32"],
            stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            said = ""
            for line in process.stdout or ():
                said += line
                if line.startswith("ask:"):
                    break
            log.seek(0)
            print(said)
            addresses = re.search(r"--address (\S+)", said), re.search(r"http://\S+/v1", said)
            assert all(addresses), said + log.read().decode()
            yield Served(grpc=addresses[0][1], openai=addresses[1][0])
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


def test_text_answers_are_transformers_token_for_token(served, text_model, expected):
    _, tokenizer = text_model
    with FocusClient(served.grpc, timeout_s=120) as client, openai.OpenAI(base_url=served.openai, api_key="-") as http:
        name = http.models.list().data[0].id
        for question, token_ids in expected.items():
            answer = client.ask([], question, max_tokens=TOKENS, logprobs=0).result()
            assert [entry.chosen.token_id for entry in answer.logprobs] == token_ids, answer.text
            turns = [{"role": "user", "content": question}]
            said = http.chat.completions.create(model=name, messages=turns, max_tokens=TOKENS)
            text = tokenizer.decode(token_ids, skip_special_tokens=True)
            assert said.choices[0].message.content == answer.text == text
            ended = "stop" if token_ids[-1] == tokenizer.eos_token_id else "length"
            assert said.choices[0].finish_reason == answer.finish_reason == ended
    assert len(set(map(tuple, expected.values()))) == len(QUESTIONS)


def test_a_large_image_is_answered_with_all_its_visual_tokens(served):
    """The random vision tower shows nothing, so only the accounts can be right or wrong."""
    pixels = np.random.default_rng(0).integers(0, 256, (1344, 1344, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    question, url = "What is in the picture?", "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    with FocusClient(served.grpc, timeout_s=300) as client:
        answer = client.ask(file.getvalue(), question, max_tokens=8, ignore_eos=True).result()
    usage = answer.usage
    assert usage.visual_tokens_uncompressed == usage.visual_tokens_sampled == 2928 >= usage.visual_tokens_kept > 0
    assert usage.completion_tokens == 8 and answer.text
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    with openai.OpenAI(base_url=served.openai, api_key="-", timeout=300) as http:
        name, turns = http.models.list().data[0].id, [{"role": "user", "content": parts}]
        said = http.chat.completions.create(model=name, messages=turns, max_tokens=8, extra_body={"ignore_eos": True})
    assert said.choices[0].message.content == answer.text and said.usage.prompt_tokens == usage.prompt_tokens
