"""Every setting of a request bears one name, and can be given at every door."""

from __future__ import annotations

import dataclasses

from click.testing import CliRunner

from focusllava.cli import cli
from focusllava.messages import SamplerSettings as ClientSamplers
from focusllava.messages import Settings
from services.common.types import SamplerSettings, SamplingParams
from services.gateway.openai.completion import CompletionRequest
from services.gateway.openai.request import ChatCompletionRequest, FocusOptions

SAMPLING = {field.name for field in dataclasses.fields(SamplingParams)} - {"constraint"}
SAMPLERS = {field.name for field in dataclasses.fields(SamplerSettings)}


def test_the_python_client_has_every_setting() -> None:
    assert ClientSamplers.__optional_keys__ == SAMPLERS
    assert SAMPLING <= Settings.__optional_keys__


def test_http_has_every_setting() -> None:
    for request in (ChatCompletionRequest, CompletionRequest):
        # vLLM's name for one of them says the opposite.
        assert SAMPLING - {"keep_special_tokens"} <= request.model_fields.keys()
    assert SAMPLERS <= FocusOptions.model_fields.keys()


def test_the_command_line_has_every_sampler_setting() -> None:
    for command in ("ask", "explain"):
        shown = CliRunner().invoke(cli, [command, "--help"]).output
        assert all(f"--{name.replace('_', '-')}" in shown for name in SAMPLERS)
