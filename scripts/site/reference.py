"""The generated part: Python and settings for mkdocstrings to fill, commands from their --help, gRPC from protos/."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence

import click

import focusllava
from focusllava.cli import cli

_CLIENT_FIRST = ("FocusClient", "AsyncFocusClient", "AnswerStream", "AsyncAnswerStream")
_SETTINGS: Mapping[str, tuple[str, str, Sequence[str]]] = {
    "serving-settings": (
        "Settings of serving",
        "`args` of the three applications of a Serve configuration ([how](../serving.md#on-a-ray-cluster)), and what "
        "is nested in them. A name or value that is not known stops the deployment and says so.",
        (
            "services.gateway.deployment.GatewaySettings",
            "services.gateway.admission.AdmissionLimits",
            "services.gateway.turns.Load",
            "services.common.media.MediaLimits",
            "services.gateway.compression.LoadCompression",
            "services.gateway.stages.StageAddress",
            "services.gateway.callers.ApiKey",
            "services.encoder.settings.EncoderSettings",
            "services.llm.settings.LanguageModelSettings",
            "services.llm.engine_config.EngineConfig",
            "services.compute.replica.ModelSettings",
        ),
    ),
    "checkpoint-settings": (
        "Settings of a checkpoint",
        "`config.json` of a checkpoint folder; [the method](../method.md) says what each choice is about.",
        (
            "services.checkpoint.config.FocusLlavaConfig",
            "services.checkpoint.config.VisionSamplerConfig",
            "services.checkpoint.config.TextSamplerConfig",
        ),
    ),
    "training-settings": (
        "Settings of training",
        "A training configuration: the fields of `RunConfig`, and under `stage` those of one stage "
        "([how](../training.md#settings)).",
        (
            "training.config.RunConfig",
            "training.config.OptimizerConfig",
            "training.config.ClusterConfig",
            "training.conversation_settings.ConversationStage",
            "training.conversation_settings.LoraSettings",
            "training.question_settings.QuestionStage",
            "training.dense_labels.DenseStage",
            "training.data.mixture.SourceSettings",
            "training.data.reading.ReaderSettings",
        ),
    ),
}


def write_reference(out: pathlib.Path, grpc_page: str) -> None:
    """Writes the pages of reference/ below `out`; grpc_page: the one of the proto files."""
    folder = out / "reference"
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in focusllava.__all__ if not name.startswith("_")]
    names = [*_CLIENT_FIRST, *(name for name in names if name not in _CLIENT_FIRST)]
    pages = {
        "client": _page("Python client", "`from focusllava import ...`: needs grpcio, protobuf and click alone.",
                        [f"focusllava.{name}" for name in names]
                        + ["focusllava.messages.Settings", "focusllava.messages.SamplerSettings"]),
        "local": _page("Without a server", "`from focusllava import LocalModel` (the [serve] extra).",
                       ["services.local.model.LocalModel", "services.local.stream.LocalStream",
                        "services.local.stream.LocalAnswer"]),
        "commands": _commands(),
        "grpc": grpc_page,
    }  # fmt: skip
    pages |= {name: _page(*settings) for name, settings in _SETTINGS.items()}
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text, "utf8")


def _page(title: str, intro: str, objects: Sequence[str]) -> str:
    return "\n\n".join([f"# {title}", intro, *(f"::: {name}" for name in objects)]) + "\n"


def _commands() -> str:
    parts = ["# Commands", "What `--help` says of `focusllava` and each of its commands."]
    for path, command in _all_commands("focusllava", cli):
        context = click.Context(command, info_name=path, max_content_width=100, terminal_width=100)
        parts += [f"## {path}", f"```text\n{command.get_help(context)}\n```"]
    return "\n\n".join(parts) + "\n"


def _all_commands(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from _all_commands(f"{path} {name}", found)
