"""The image's file against the tree: what it copies is there, what runs is not left out, and nobody runs as root."""

from __future__ import annotations

import pathlib
import re
import subprocess
import tomllib

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()
KEPT = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}


def test_everything_is_left_out_but_what_runs():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    packages = {name.rstrip("*") for name in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages < KEPT and "checkpoints/focusllava-tiny" in KEPT
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for kept in KEPT:
        assert any(file == kept or file.startswith(f"{kept}/") for file in tracked), kept


def test_what_is_copied_and_installed_is_there():
    (copied,) = re.findall(r"^COPY (?!--from)(.+) \./$", DOCKERFILE, re.M)
    assert set(copied.split()) <= KEPT
    extras = {*re.findall(r"^ARG EXTRA=(\w+)", DOCKERFILE, re.M), *re.findall(r"EXTRA=(\w+)", DOCKERFILE)}
    assert extras == {"serve", "train"} <= set(PROJECT["project"]["optional-dependencies"])


def test_it_runs_as_nobody_special_and_holds_no_secret():
    stage = DOCKERFILE.rpartition("\nFROM ")[2]
    user = int(re.findall(r"^USER (\d+)$", stage, re.M)[-1])
    assert user > 0 and f"--uid {user}" in stage
    assert stage.index("\nUSER ") > stage.rindex("\nRUN ")
    assert not re.search(r"^(ARG|ENV) .*(TOKEN|PASSWORD|SECRET|KEY)", DOCKERFILE, re.M)
