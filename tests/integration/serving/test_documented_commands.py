"""What the documentation asks of a server, asked of one as it is written: at another port, and of another model."""

from __future__ import annotations

import os
import pathlib
import subprocess

import pytest

from tests.documented import Command, commands, here, python_blocks, workplace
from tests.unit.test_documented_commands import SERVED, TESTED, first_kind

ASKED = list({one.text: one for one in commands() if TESTED.get(first_kind(one)) == SERVED}.values())
PYTHON = {"README.md": "FocusClient(", "docs/serving.md": "OpenAI(", "docs/tutorials/ask.md": "FocusClient("}
"""Pages with a block of Python that asks a server, and what tells it from others."""


def test_there_is_something_to_ask() -> None:
    assert len(ASKED) >= 10


@pytest.mark.parametrize("command", ASKED, ids=str)
def test_a_command_is_answered(command: Command, cluster, checkpoint, tmp_path: pathlib.Path) -> None:
    text = here(command.text).replace("http://127.0.0.1:8000/v1", cluster.openai_url)
    text = text.replace("focusllava-tiny", checkpoint[0].name)
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "FOCUSLLAVA_ADDRESS": cluster.grpc_address}
    done = subprocess.run(["bash", "-c", f"set -euo pipefail\n{text}"], cwd=workplace(tmp_path), env=environment,
                          text=True, capture_output=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() or "visual tokens" in done.stderr
    if "curl" in text:
        assert done.stdout.rstrip().endswith("data: [DONE]")
    if "--map " in text:
        assert (tmp_path / "map.png").stat().st_size > 10_000


@pytest.mark.parametrize("page", PYTHON)
def test_python_is_answered(page: str, cluster, checkpoint, tmp_path: pathlib.Path, monkeypatch, capsys) -> None:
    (block,) = (block for block in python_blocks(page) if PYTHON[page] in block)
    block = block.replace("http://127.0.0.1:8000/v1", cluster.openai_url).replace("focusllava-tiny", checkpoint[0].name)
    block = block.replace("127.0.0.1:9000", cluster.grpc_address)
    monkeypatch.chdir(workplace(tmp_path))
    exec(compile(block, page, "exec"), {})
    assert capsys.readouterr().out.strip()
