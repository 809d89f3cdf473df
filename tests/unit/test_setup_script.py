"""scripts/setup.sh with a python that only writes down what it is asked: which environments it makes and clears."""

from __future__ import annotations

import pathlib
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "setup.sh"
PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$LOG"
[ "${1-}${2-}" = -mvenv ] || exit 0
venv=${!#}
case "$*" in *--clear*) rm -rf "$venv" ;; esac
mkdir -p "$venv/bin" && cp "$0" "$venv/bin/python"
"""


def run(folder: pathlib.Path) -> tuple[int, list[str]]:
    """The exit status, and how `-m venv` was called."""
    (folder / "requirements.lock").write_text("x==1\n")
    _script(folder / "python3", PYTHON)
    log = folder / "log"
    log.unlink(missing_ok=True)
    done = subprocess.run(
        [SCRIPT, ".venv", folder / "python3"],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "CXX": "true", "LOG": str(log)},
        capture_output=True,
        text=True,
    )
    return done.returncode, [line for line in log.read_text().splitlines() if line.startswith("-m venv")]


def _script(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    _script(tmp_path / ".venv/bin/ray", "")  # else 4 GB of free disk are asked for
    return tmp_path


def test_a_half_made_environment_is_made_again(folder: pathlib.Path) -> None:
    (folder / ".venv/pyvenv.cfg").touch()
    _script(folder / ".venv/bin/python", "#!/bin/sh\nexit 1\n")  # has no pip
    assert run(folder) == (0, ["-m venv --clear .venv"])
    assert not (folder / ".venv/bin/ray").exists()
    assert run(folder) == (0, []), "a whole one is kept"


def test_a_folder_that_is_no_environment_is_not_cleared(folder: pathlib.Path) -> None:
    (folder / ".venv/precious").touch()
    assert run(folder) == (0, ["-m venv .venv"])
    assert (folder / ".venv/precious").exists()
